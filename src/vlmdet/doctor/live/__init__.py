"""Live models: a small random model of the user's architecture, his trainer on it, three steps, one row learnt by heart."""
