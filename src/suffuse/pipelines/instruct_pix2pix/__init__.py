"""Pictures edited by instructions (Brooks et al., 2023, "InstructPix2Pix: Learning to follow image editing instructions")."""
