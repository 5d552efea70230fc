"""The tasks of `unclip sample`: from files and captions to a labelled grid and single pictures."""
