"""Models that other makers' tools quantized, as floats again: fp8, compressed-tensors, bitsandbytes, GPTQ, AWQ,
ModelOpt, MXFP4.

`method.of_folder` recognises the maker, one module per format reads its tensors, `folder` writes the plain model. Each
format's formula is in its module; everything is computed in float32 and rounded once.
"""
