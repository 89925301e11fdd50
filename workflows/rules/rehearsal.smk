# What the paper scale runs, on look-alikes on the CPU: asked for by name, never part of the tables. `snakemake rehearse`
# goes on where an earlier one stopped, and says how it went; results/rehearsals.json holds each outcome.
rule rehearse:
    params:
        folder=str(RESULTS / "look_alikes"),
    shell:
        "{sys.executable} -m prunelab rehearse --folder {params.folder:q} {OVERRIDES}"
