"""Text, pictures, video and sound as groups of tokens in one sequence, and one decoder that predicts the next group."""
