"""The loop that trains any stage, and what it reads, keeps and reports."""
