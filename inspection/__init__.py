"""What analyze.py is made of: models that read text, what is found in them, and how that is told and drawn."""
