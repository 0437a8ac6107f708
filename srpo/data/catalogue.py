"""The catalogue of the generated world: domains, category tree, typed attributes with synonyms, brands, everyday knowledge.

Written for this project; every name is a common noun or invented. A *surface* is one wording of a category or value in queries
and titles; reasoning steps write its canonical form. Groups are the inner nodes of the tree: two leaves of one group are
*related*.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

# type -> {value: surfaces}. Values of one type are mutually exclusive.
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "color": {
        "red": ("red", "crimson", "scarlet"),
        "blue": ("blue", "navy", "azure"),
        "black": ("black", "jet black", "onyx"),
        "white": ("white", "ivory", "snow white"),
        "green": ("green", "olive", "emerald"),
        "gray": ("gray", "charcoal", "slate"),
    },
    "weather": {
        "waterproof": ("waterproof", "rainproof", "storm proof"),
        "breathable": ("breathable", "ventilated", "airy"),
        "insulated": ("insulated", "thermal", "warm lined"),
    },
    "upper": {
        "leather": ("leather", "cowhide"),
        "canvas": ("canvas", "cotton duck"),
        "mesh": ("mesh", "knit"),
    },
    "closure": {"zipper": ("zipper", "zip up"), "buttons": ("buttons", "button front"), "laces": ("laces", "lace up")},
    "fabric": {"cotton": ("cotton", "jersey"), "wool": ("wool", "merino"), "polyester": ("polyester", "microfiber")},
    "neck": {
        "turtleneck": ("turtleneck", "roll neck"),
        "crewneck": ("crewneck", "round neck"),
        "hooded": ("hooded", "with hood"),
    },
    "metal": {"gold": ("gold", "gilded"), "silver": ("silver", "sterling"), "steel": ("steel", "stainless")},
    "coating": {
        "nonstick": ("nonstick", "easy release"),
        "ceramic": ("ceramic", "enamel"),
        "uncoated": ("uncoated", "bare iron"),
    },
    "power": {
        "cordless": ("cordless", "battery powered"),
        "corded": ("corded", "plug in"),
        "manual": ("manual", "hand operated"),
    },
    "cleaning": {
        "degreasing": ("degreasing", "grease cutting"),
        "descaling": ("descaling", "limescale removing"),
        "bleaching": ("bleaching", "stain whitening"),
    },
    "scent": {"lemon": ("lemon", "citrus"), "lavender": ("lavender", "floral"), "unscented": ("unscented", "fragrance free")},
    "link": {"bluetooth": ("bluetooth", "wireless"), "wired": ("wired", "cable"), "usb": ("usb", "usb c")},
    "noise": {"silent": ("silent", "quiet"), "loud": ("loud", "high volume"), "cancelling": ("cancelling", "noise blocking")},
    "frame": {"oak": ("oak", "solid wood"), "aluminum": ("aluminum", "alloy"), "bamboo": ("bamboo", "rattan")},
    "posture": {
        "ergonomic": ("ergonomic", "lumbar support"),
        "foldable": ("foldable", "collapsible"),
        "stackable": ("stackable", "nesting"),
    },
    "skin": {"oily": ("oily", "shine control"), "dry": ("dry", "deep moisture"), "sensitive": ("sensitive", "hypoallergenic")},
    "size": {"large": ("large", "oversized"), "small": ("small", "compact"), "medium": ("medium", "mid size")},
    "age": {"toddler": ("toddler", "preschool"), "teen": ("teen", "youth"), "adult": ("adult", "grown up")},
    "diet": {"grainfree": ("grainfree", "no grain"), "puppy": ("puppy", "junior formula"), "senior": ("senior", "aging formula")},
    "ink": {"gel": ("gel", "smooth gel"), "permanent": ("permanent", "fade proof"), "erasable": ("erasable", "frixion")},
    "terrain": {"trail": ("trail", "off road"), "indoor": ("indoor", "court"), "road": ("road", "street")},
    "fuel": {"gas": ("gas", "propane"), "charcoal": ("briquette", "coal fired"), "electric": ("electric", "mains")},
}

# domain -> group -> (attribute types, {leaf: further surfaces}). The name of a leaf is its first surface.
_TREE: dict[str, dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]]] = {
    "footwear": {
        "shoes": (
            ("color", "weather", "upper"),
            {"sneakers": ("trainers",), "loafers": ("moccasins",), "boots": ("ankle boots",), "sandals": ("slides",)},
        ),
        "legwear": (("color", "fabric", "size"), {"socks": ("crew socks",), "tights": ("hosiery",), "gaiters": ("leg covers",)}),
    },
    "clothing": {
        "outerwear": (("color", "weather", "closure"), {"jacket": ("windbreaker",), "parka": ("anorak",), "vest": ("gilet",)}),
        "tops": (("color", "fabric", "neck"), {"sweater": ("pullover",), "shirt": ("tee",), "blouse": ("tunic",)}),
    },
    "accessories": {
        "jewelry": (("metal", "size", "age"), {"necklace": ("pendant",), "bracelet": ("bangle",), "earrings": ("ear studs",)}),
        "carry": (("color", "upper", "size"), {"backpack": ("rucksack",), "handbag": ("purse",), "suitcase": ("luggage",)}),
    },
    "kitchen": {
        "cookware": (
            ("coating", "size", "color"),
            {"skillet": ("frying pan",), "saucepan": ("milk pot",), "wok": ("stir fry pan",)},
        ),
        "appliances": (
            ("power", "color", "size"),
            {"blender": ("smoothie maker",), "kettle": ("water boiler",), "grinder": ("coffee mill",)},
        ),
    },
    "household": {
        "cleaners": (
            ("cleaning", "scent", "size"),
            {"spray": ("surface cleaner",), "detergent": ("washing powder",), "wipes": ("cleaning cloths",)},
        ),
        "vacuums": (("power", "noise", "color"), {"vacuum": ("hoover",), "mop": ("floor mop",), "sweeper": ("carpet broom",)}),
    },
    "electronics": {
        "audio": (
            ("link", "noise", "color"),
            {"headphones": ("headset",), "speaker": ("soundbar",), "earbuds": ("in ear phones",)},
        ),
        "computing": (
            ("link", "size", "color"),
            {"keyboard": ("typing board",), "mouse": ("trackball",), "webcam": ("video camera",), "tablet": ("touch pad pc",)},
        ),
    },
    "furniture": {
        "seating": (("posture", "frame", "color"), {"chair": ("desk chair",), "stool": ("bar seat",), "bench": ("settle",)}),
        "storage": (
            ("frame", "size", "color"),
            {"bookcase": ("bookshelf",), "dresser": ("chest of drawers",), "cabinet": ("cupboard",)},
        ),
    },
    "beauty": {
        "skincare": (("skin", "scent", "size"), {"cleanser": ("face wash",), "lotion": ("moisturizer",), "serum": ("essence",)}),
        "haircare": (
            ("scent", "age", "size"),
            {"shampoo": ("hair wash",), "conditioner": ("hair balm",), "pomade": ("hair wax",)},
        ),
    },
    "sports": {
        "cycling": (
            ("terrain", "frame", "color"),
            {"bicycle": ("bike",), "scooter": ("kick scooter",), "tricycle": ("three wheeler",)},
        ),
        "camping": (("weather", "size", "color"), {"tent": ("shelter",), "hammock": ("hanging bed",), "tarp": ("ground sheet",)}),
    },
    "toys": {
        "games": (("age", "size", "frame"), {"puzzle": ("jigsaw",), "blocks": ("building bricks",), "dominoes": ("tile game",)}),
        "dolls": (("age", "fabric", "size"), {"doll": ("baby doll",), "puppet": ("marionette",), "plush": ("stuffed animal",)}),
    },
    "pets": {
        "petfood": (("diet", "size", "age"), {"kibble": ("dry food",), "treats": ("chews",), "broth": ("wet food",)}),
        "petgear": (("color", "upper", "size"), {"leash": ("dog lead",), "harness": ("pet vest",), "collar": ("neck band",)}),
    },
    "office": {
        "writing": (("ink", "color", "size"), {"pen": ("ballpoint",), "marker": ("felt tip",), "highlighter": ("text marker",)}),
    },
    "garden": {
        "grilling": (("fuel", "size", "color"), {"grill": ("barbecue",), "smoker": ("smoke oven",), "griddle": ("flat top",)}),
    },
}

# Everyday knowledge: (use named in a query, attribute type, value it implies), for every leaf that has the type.
KNOWLEDGE: tuple[tuple[str, str, str], ...] = (
    ("mountaineering", "weather", "waterproof"),
    ("rainy days", "weather", "waterproof"),
    ("hot summers", "weather", "breathable"),
    ("deep winter", "weather", "insulated"),
    ("formal dinners", "upper", "leather"),
    ("marathon running", "upper", "mesh"),
    ("gym workouts", "fabric", "polyester"),
    ("freezing offices", "fabric", "wool"),
    ("babies with allergies", "fabric", "cotton"),
    ("cold necks", "neck", "turtleneck"),
    ("windy walks", "neck", "hooded"),
    ("wedding gifts", "metal", "gold"),
    ("daily swimming", "metal", "steel"),
    ("frying eggs", "coating", "nonstick"),
    ("open fire cooking", "coating", "uncoated"),
    ("power cuts", "power", "manual"),
    ("garden sheds without sockets", "power", "cordless"),
    ("greasy kitchens", "cleaning", "degreasing"),
    ("hard water stains", "cleaning", "descaling"),
    ("asthma sufferers", "scent", "unscented"),
    ("better sleep", "scent", "lavender"),
    ("studio latency", "link", "wired"),
    ("phones without jacks", "link", "bluetooth"),
    ("night shifts", "noise", "silent"),
    ("long flights", "noise", "cancelling"),
    ("back pain", "posture", "ergonomic"),
    ("tiny apartments", "posture", "foldable"),
    ("humid porches", "frame", "aluminum"),
    ("teenage acne", "skin", "oily"),
    ("flaky cheeks", "skin", "dry"),
    ("hand luggage", "size", "small"),
    ("big families", "size", "large"),
    ("nursery school", "age", "toddler"),
    ("high school", "age", "teen"),
    ("young dogs", "diet", "puppy"),
    ("old dogs", "diet", "senior"),
    ("signing contracts", "ink", "permanent"),
    ("math homework", "ink", "erasable"),
    ("forest paths", "terrain", "trail"),
    ("commuting downtown", "terrain", "road"),
    ("balcony cooking", "fuel", "electric"),
    ("smoky flavor", "fuel", "charcoal"),
)

# brand -> the leaf it is known for: a query "BRAND alternative" looks for that leaf.
BRANDS: dict[str, str] = {
    "velora": "sneakers", "tamsin": "boots", "okari": "socks", "norvik": "jacket", "polvane": "parka", "lumise": "sweater",
    "ardane": "shirt", "sorelle": "necklace", "kestro": "backpack", "vantor": "suitcase", "brasco": "skillet", "mirova":
    "blender", "tefaro": "kettle", "glanzo": "spray", "puredo": "detergent", "whirlo": "vacuum", "sonara": "headphones",
    "audiq": "earbuds", "keyra": "keyboard", "padlin": "tablet", "sedora": "chair", "holtz": "bookcase", "dermia": "cleanser",
    "florelle": "lotion", "capilo": "shampoo", "rodano": "bicycle", "campara": "tent", "ludeko": "puzzle", "brixo": "blocks",
    "minouche": "doll", "pawlin": "kibble", "trotto": "leash", "scribo": "pen", "markado": "marker", "fumaro": "grill",
    "zenvia": "handbag",
}  # fmt: skip

MARKETING: tuple[str, ...] = (
    "premium", "new", "hot sale", "best seller", "official", "classic", "luxury", "upgraded", "durable", "stylish",
    "limited", "free shipping", "value pack", "trending", "everyday", "top rated", "modern", "authentic", "deluxe", "essential",
)  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """A leaf category."""

    name: str
    group: str
    domain: str
    surfaces: tuple[str, ...]
    attributes: tuple[str, ...]  # attribute types of its items, in addition to the brand

    @property
    def path(self) -> str:
        """The category as reasoning steps write it, "group leaf", in the same form as an attribute and its value."""
        return f"{self.group} {self.name}"


class Catalogue:
    """Indexes of the tables above."""

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """All leaf categories in a fixed order."""
        return tuple(
            Leaf(name, group, domain, (name, *surfaces), types)
            for domain, groups in _TREE.items()
            for group, (types, leaves) in groups.items()
            for name, surfaces in leaves.items()
        )

    @cached_property
    def leaf(self) -> dict[str, Leaf]:
        """Leaf by name."""
        return {leaf.name: leaf for leaf in self.leaves}

    @cached_property
    def leaf_of_surface(self) -> dict[str, Leaf]:
        """Surface -> its leaf."""
        return {surface: leaf for leaf in self.leaves for surface in leaf.surfaces}

    @cached_property
    def siblings(self) -> dict[str, tuple[Leaf, ...]]:
        """Leaf name -> the other leaves of its group."""
        return {a.name: tuple(b for b in self.leaves if b.group == a.group and b.name != a.name) for a in self.leaves}

    @cached_property
    def brands_of_domain(self) -> dict[str, tuple[str, ...]]:
        """Domain -> the brands known for one of its leaves."""
        domains = {leaf.domain for leaf in self.leaves}
        return {d: tuple(b for b, leaf in BRANDS.items() if self.leaf[leaf].domain == d) for d in sorted(domains)}

    @cached_property
    def knowledge_of_type(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """Attribute type -> ((use, value), ...)."""
        return {t: tuple((use, v) for use, kind, v in KNOWLEDGE if kind == t) for t in ATTRIBUTES}


CATALOGUE = Catalogue()
