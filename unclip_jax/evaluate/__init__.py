"""The command that measures a model: pictures drawn and read, figures, and the page of both."""
