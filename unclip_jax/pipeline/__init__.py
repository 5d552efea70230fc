"""Stages and params together: pictures from captions, and edits of pictures."""
