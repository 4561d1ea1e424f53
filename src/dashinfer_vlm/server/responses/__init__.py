"""OpenAI's Responses API: another face of chat's conversation, with answers that are kept for the next turn."""
