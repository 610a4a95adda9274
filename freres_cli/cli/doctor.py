"""``freres doctor``: what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

from freres_cli.cli import options
from freres_cli.cli.output import print_json, print_table


def doctor(json: options.Json = False) -> None:
    """Check what this machine can run.

    Looks at packages, defaults from the environment, decoders, devices, attention kernels, memory, the bundled model,
    the model hub and each model family. Every line says ok, limited or missing, and what that means. The exit status is
    0 if the main job can run.
    """
    from freres_cli.errors import ResourceError
    from freres_cli.workflows.doctor import examine_machine

    findings = examine_machine()
    missing = [finding.part for finding in findings if finding.state == "missing" and finding.is_needed]
    if json:
        from freres_cli.bench.report import describe_environment
        from freres_cli.devices import choose_device

        rows = [vars(finding) for finding in findings]
        print_json("freres.doctor/1", {"findings": rows, "environment": describe_environment(choose_device())})
    else:
        print_table(("part", "state", "what"), [(f.part, f.state, f.text) for f in findings])
    if missing:
        raise ResourceError(
            f"the main job cannot run: {', '.join(missing)}", "the lines that say missing tell what to do"
        )
