"""An analysis as numbers: what a paper's table or figure is made of."""

from dataclasses import asdict

from camdistill.layers.analysis import Analysis
from camdistill.layers.filters import weight_rows
from camdistill.layers.portraits import Portrait
from camdistill.layers.profiles import rows_by_layer


def analysis_results(found: Analysis) -> dict[str, object]:
    """What `results.json` holds."""
    sweep = found.sweep
    results: dict[str, object] = {
        "n": sweep.images,
        "data": found.data,
        "used": dict(sweep.used),
        "notes": list(sweep.notes),
        "unfinished": found.unfinished,
        "findings": [asdict(one) for one in found.findings],
        "networks": rows_by_layer(sweep),
        "weights": {network: weight_rows(rows) for network, rows in found.weights.items()},
    }
    if sweep.similarity is not None:
        results["cka"] = {
            "layers": [list(pair) for pair in sweep.similarity.layers],
            "values": sweep.similarity.cka,
            "images": sweep.similarity.images,
            "batches": sweep.similarity.batches,
        }
    if sweep.cam_similarity is not None:
        results["cam_cosine"] = {
            "teacher": list(sweep.cam_similarity.teacher),
            "student": list(sweep.cam_similarity.student),
            "values": sweep.cam_similarity.cosine,
            "images": sweep.cam_similarity.images,
        }
    results["matches"] = [
        {
            "teacher": match.teacher,
            "student": match.student,
            "best": match.best,
            "correlation": match.correlation,
            "partner": match.partner,
            "partner_correlation": match.partner_correlation,
            "images": match.images,
        }
        for match in sweep.matches
    ]
    results["pairs"] = {
        layer: [asdict(pair) for pair in pairs] for layer, pairs in found.pairs.items()
    }
    results["units"] = {
        network: {
            layer: [_unit_row(one) for one in portraits] for layer, portraits in layers.items()
        }
        for network, layers in found.portraits.items()
    }
    return results


def _unit_row(one: Portrait) -> dict[str, object]:
    return {
        "unit": one.unit,
        "sees": one.seen,
        "images": [patch.image for patch in one.patches],
        "values": [patch.value for patch in one.patches],
        "reached": one.reached,
        "natural": one.natural,
        "concepts": [list(concept) for concept in one.concepts],
    }
