"""Fast paths beside the plain-torch references of `dashinfer_vlm.layers`: native CPU kernels (`cpu_ops`)."""
