"""Cards of measured explanations: evaluation, ranking, refinement, the paper's claims."""

from camdistill.tags.groups import EVALUATION, MAPS, OVERVIEW, card

FAITHFULNESS = card(
    f"{EVALUATION}/faithfulness",
    "Explainers and controls by every metric that asks the network, with 95 % intervals over"
    " images. A metric by which a control stands above an explainer ranks nothing.",
)
LOCALIZATION = card(
    f"{EVALUATION}/localization",
    "Explainers and controls by what is known of the images: the objects' masks. It is about the"
    " network only where the network looks at the object.",
)
CURVES = card(
    f"{EVALUATION}/curves",
    "Mean probability of the explained class as pixels are put into a blurred image (insertion: the"
    " higher, the better) or grayed (deletion: the lower), most relevant first.",
)
BEST_AND_WORST = card(
    f"{EVALUATION}/best_and_worst",
    "The images whose map the first ranking metric likes most, and least.",
)
GAIN = card(
    f"{OVERVIEW}/simulatability_gain",
    "What students taught with a method's maps agree with the teacher on unseen images more than"
    " students without maps; the step is the number of training images. 0: the maps teach nothing.",
)
REFINED = card(
    f"{EVALUATION}/map_parts",
    "What a refined network's own map gained by every metric, less what its start's map gained on"
    " the same network; 95 % intervals over starts and images. 0: only the answers changed.",
)
MAP_PART = card(
    f"{EVALUATION}/map_part_of_road",
    "ROAD of a refined network's map less that of its start's map, both on the refined network;"
    " test images. Step: the chosen epoch. 0: only the answers changed, if anything.",
)
REFINED_MAPS = card(
    f"{MAPS}/refined",
    "The same test images: the start network's map, and that of what each arm made of it, each as a"
    " share of its own maximum. Step: number of the image.",
)
EVALUATION_TABLE = card(f"{EVALUATION}/table", "All numbers, and what to beware of.")
CLAIMS_TABLE = card(
    f"{EVALUATION}/claims",
    "The Grad-CAM paper's claims: its numbers, ours, the criterion, and whether the claim holds.",
)
CLAIMS_LOCALIZATION = card(
    f"{EVALUATION}/claims_localization",
    "What the paper says of where maps lie, row by row, with 95 % intervals.",
)
CLAIMS_FAITHFULNESS = card(
    f"{EVALUATION}/claims_faithfulness",
    "What it says of maps and the network's behavior, of layers, and its ablations.",
)
CLAIMS_WORLDS = card(
    f"{EVALUATION}/claims_worlds",
    "What it says of observers, trust, bias, counterfactuals and adversaries, each in a little"
    " world whose truth is known.",
)
