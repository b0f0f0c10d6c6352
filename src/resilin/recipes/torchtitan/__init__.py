"""What the recipe `torchtitan` needs: runs that change their layout, and their analysis."""
