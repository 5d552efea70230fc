"""The tasks of sample.py: from files and captions to a labelled grid and single pictures."""
