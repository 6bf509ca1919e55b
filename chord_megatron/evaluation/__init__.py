"""How well a model does on prompts with checkable answers, and how sure that is."""
