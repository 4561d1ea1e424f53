"""Anthropic's Messages API: another form of the conversations and answers that `chat.py` serves."""
