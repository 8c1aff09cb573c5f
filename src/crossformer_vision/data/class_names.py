"""Class names of published weights."""

from collections.abc import Sequence

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The 150 classes of ADE20K's scene parsing benchmark, by index, as in OpenMMLab.
ADE20K = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag""".replace("\n   ", "").split(", ")
)


def coco() -> list[str]:
    """COCO's 80 classes in the order of their ids, from torchvision."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    known = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return [name for name in known if name not in ("N/A", "__background__")]


def of_weights(tag: str, count: int) -> Sequence[str]:
    """Class names of a timm model's weights: ImageNet-1k, CIFAR-10, or else numbers.

    Args:
        tag: Tag of the weights.
        count: Number of classes.
    """
    if count == 1000:
        from timm.data import ImageNetInfo

        return [name.split(", ")[0] for name in ImageNetInfo().label_descriptions()]
    return CIFAR10 if tag == "cifar10" and count == 10 else [str(k) for k in range(count)]
