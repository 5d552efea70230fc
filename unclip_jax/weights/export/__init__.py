"""What is trained here in the forms of other programs."""
