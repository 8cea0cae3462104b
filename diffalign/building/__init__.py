"""Preference data: prompts -> candidates -> scores -> filters -> groups that the trainer reads."""
