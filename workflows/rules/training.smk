# Training a testbed anew, or fine-tuning one with pruning on, into a folder of its own: asked for by name, never part
# of the tables. `snakemake results/training/digits_vim_decay/training.json`; an interrupted one goes on.
rule training:
    output:
        str(RESULTS / "training" / "{testbed}" / "training.json"),
        str(RESULTS / "training" / "{testbed}" / "model.safetensors"),
    params:
        folder=str(RESULTS / "training" / "{testbed}"),
    threads: 2
    shell:
        "{sys.executable} -m prunelab train {wildcards.testbed} --out {params.folder} --threads {threads}"
