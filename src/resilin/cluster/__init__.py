"""Workers: how they are started, how they find each other, and how they end."""
