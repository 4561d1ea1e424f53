"""Vision encoders on other machines. Ray places, starts and connects them; the messages are ours."""
