"""Text from trained models: the model in plain torch with a key/value cache, and how its next token is
chosen.
"""
