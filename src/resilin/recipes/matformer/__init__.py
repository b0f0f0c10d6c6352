"""Recipe `matformer`: one nested model against models of each size trained alone."""
