"""The analysis of the recipe `small-scale-proxies` (Wortsman et al., 2023): one file for each part of the paper."""

from __future__ import annotations

from resilin.recipes.findings import Findings, Study
from resilin.recipes.small_scale_proxies.attention import attention_findings
from resilin.recipes.small_scale_proxies.epsilon import epsilon_findings
from resilin.recipes.small_scale_proxies.interventions import intervention_findings
from resilin.recipes.small_scale_proxies.output_logits import output_logit_findings
from resilin.recipes.small_scale_proxies.sensitivity import sensitivity_findings
from resilin.recipes.small_scale_proxies.sizes import size_findings

PARTS = (
    sensitivity_findings,
    attention_findings,
    output_logit_findings,
    size_findings,
    epsilon_findings,
    intervention_findings,
)


def analyse(study: Study) -> Findings:
    """Figures and claims of the paper from the runs of a preset; a part whose grid is absent says nothing."""
    found = [part(study) for part in PARTS]
    return Findings(
        rows=tuple(row for f in found for row in f.rows),
        claims=tuple(claim for f in found for claim in f.claims),
        tables=tuple(table for f in found for table in f.tables),
        plots=tuple(plot for f in found for plot in f.plots),
        notes=tuple(note for f in found for note in f.notes),
    )


__all__ = ["analyse"]
