"""Merge methods beyond + - * /: one module here and one yaml in conf/method each; nothing is registered.

A method `ties` is the module `ties.py` with one public function of that name, pure, of whole tensors:

    def ties(base: Tensor, *models: Tensor, density: float, context: Context) -> Tensor:

Its tensors are fp32, of one shape, finite, on one device, and must not be changed in place; it returns fp32 of that
shape. It is called once per *canonical* tensor: an `in_proj_weight` comes as its three parts (query, key, value), a
1x1 convolution as a matrix, CLIP-G's `text_projection` as diffusers holds it. So an answer does not depend on the
layout of the file, and a method sees what a layer multiplies with: 1-D biases and norms, 2-D matrices, 4-D kernels.

Its yaml, `conf/method/ties.yaml`, is the schema and the default; the function has no defaults of its own:

    source: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, Algorithm 1
    arguments: [model, model...]     # each is `model` or `difference`; the last may end in `...`: one or more
    gives: model                     # or `difference`
    parameters:
      density: 0.2                   # with a comment: meaning, unit, why this number

A `difference` is an expression whose models' weights sum to 0, such as `anxl3 - anxl2`; a `model`'s sum to 1. The
formula's reader checks both, so a method need not. Parameters are numbers (also coefficients: `slerp(x, y, t=a)`),
`true`/`false`, or strings; the kind is the default's. The function checks ranges and raises BadSetting. In a formula:

    merged = ties(beta7, base7, anxl3, density=0.3)
    merged = beta7 + 0.8 * dare(anxl3 - anxl2, density=0.5, seed=1)

`context` (ambergrade.merge.method.Context) knows the tensor's canonical name and gives random numbers keyed by
(seed, tensor name): `context.uniform(shape, seed, *item)`, fp32 in [0, 1). Randomised methods have a parameter `seed`;
two calls with one seed draw alike. Nothing else random may be used.

The bits must not depend on threads or SIMD width: elementwise operations and selections (`kthvalue`, `topk`, `sort`)
are safe, sums and norms are not. Use `ambergrade.merge.reduce.total` and `dot`, which add in one fixed order in fp64.
Helpers shared by methods live beside this package (`merge/reduce.py`), not in it: each module here is a method.

LoRA is not a method but has its own module, `ambergrade.merge.lora`:

    Shape = tuple[int, ...]
    def targets(entries: Mapping[str, Shape], weights: Mapping[str, Shape]) -> dict[str, tuple[str, ...]]
        # shapes from headers alone: names in the LoRA file, single-file names of the model. For each weight that the
        # LoRA changes, the LoRA's tensors that it needs. BadInput for a LoRA key that nothing uses.
    def difference(name: str, tensors: Mapping[str, Tensor], base: Tensor) -> Tensor
        # fp32, at strength 1, in the shape of `base`: the weight called `name` (single-file layout) of the formula's
        # first model, which DoRA and rank-deficient forms need; `tensors` are those that `targets` named.
"""
