"""Stages that make the training data: questions, samples, SFT set, pairs, and token ids."""
