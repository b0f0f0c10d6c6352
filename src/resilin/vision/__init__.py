"""Images and video: sources, models and the classification objective."""
