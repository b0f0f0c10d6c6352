"""What the recipe `elaswave` needs: runs that lose replicas, the ways to go on, and their analysis."""
