"""The whole job, its dry run, and the command line."""
