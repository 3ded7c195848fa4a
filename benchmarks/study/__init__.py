"""A study of what SPO is worth: many short trainings of the toy model, in one process each, without Ray and vLLM.

It takes the pipeline's own steps, methods and settings; docs/study.md has the questions and the results.
"""
