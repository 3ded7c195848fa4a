"""The mathematics: pure PyTorch and standard library."""
