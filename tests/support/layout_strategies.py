"""Generated shapes, regions and layouts."""

from __future__ import annotations

from hypothesis import strategies as st

from resilin.layout import Layout, Place, Region, rank

shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...], empty: bool = True) -> Region:
    offsets, sizes = [], []
    for size in shape:
        low = draw(st.integers(0, size - (not empty)))
        high = draw(st.integers(low + (not empty), size))
        offsets.append(low)
        sizes.append(high - low)
    return Region(tuple(offsets), tuple(sizes))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Disjoint boxes that cover a tensor: it is cut in two, again and again, at random."""
    boxes = [Region.whole(shape)]
    for _ in range(draw(st.integers(0, 5))):
        cuttable = [(i, d) for i, box in enumerate(boxes) for d, size in enumerate(box.sizes) if size > 1]
        if not cuttable:
            break
        number, dim = draw(st.sampled_from(cuttable))
        box = boxes.pop(number)
        at = draw(st.integers(1, box.sizes[dim] - 1))
        boxes.append(Region(box.offsets, (*box.sizes[:dim], at, *box.sizes[dim + 1 :])))
        offsets = (*box.offsets[:dim], box.offsets[dim] + at, *box.offsets[dim + 1 :])
        boxes.append(Region(offsets, (*box.sizes[:dim], box.sizes[dim] - at, *box.sizes[dim + 1 :])))
    return boxes


@st.composite
def layouts(draw: st.DrawFn, tensors: dict[str, tuple[int, ...]], places: int = 5, tangled: bool = False) -> Layout:
    """Every tensor tiled, each tile at one to three places; with `tangled` a second tiling, and loose boxes besides."""
    held: list[tuple[str, Place, Region]] = []
    for name, shape in tensors.items():
        for _ in range(1 + (tangled and draw(st.booleans()))):
            for box in draw(tilings(shape)):
                where = draw(st.sets(st.integers(0, places - 1), min_size=1, max_size=3))
                held += [(name, rank(number), box) for number in where]
        for _ in range(draw(st.integers(0, 2)) if tangled else 0):
            held.append((name, rank(draw(st.integers(0, places - 1))), draw(regions(shape, empty=False))))
    # A place must not hold the same elements twice, so that "moves each byte once" has a meaning.
    clean: list[tuple[str, Place, Region]] = []
    for name, place, box in held:
        left = [box]
        for other_name, other_place, other in clean:
            if (other_name, other_place) == (name, place):
                left = [rest for one in left for rest in one - other]
        clean += [(name, place, rest) for rest in left]
    return Layout.of({name: (shape, "F32") for name, shape in tensors.items()}, clean)
