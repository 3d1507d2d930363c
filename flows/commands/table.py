"""The commands of espalier, in the order in which its help lists them."""

from flows.commands.group import Entry, Sections

SECTIONS: Sections = {
    "Start": {
        "init": Entry(
            "flows.initialise:init",
            "Write a short params.yaml for your model and your images.",
            "espalier init --model /models/my-ddpm --data /data/my-images",
        ),
        "preset": Entry(
            "stages.tools.__main__:preset",
            "Replace params.yaml by one of the presets of recipes/presets.",
            "espalier preset cifar10",
        ),
        "plan": Entry(
            "flows.planning:plan",
            "Show what a run would compute and take, before it starts.",
            "espalier plan --preset cifar10 --set prune.target.macs=44% --tflops 40 --price 2.5",
        ),
        "doctor": Entry(
            "flows.commands.doctor:doctor",
            "Check this machine: packages, device, storage, servers.",
            "espalier doctor",
        ),
    },
    "Run": {
        "run": Entry(
            "flows.commands.run:run",
            "Bring every stage up to date and print the results.",
            "espalier run",
        ),
        "compress": Entry(
            "flows.commands.compress:compress",
            "The same as a flow; also other values, presets, commits.",
            "espalier compress --set prune.target.macs=44% --register",
        ),
        "sweep": Entry(
            "flows.commands.sweep:sweep",
            "Compress every combination of some values, and compare.",
            "espalier sweep --grid importance.criterion=diff-pruning,magnitude --grid prune.target.macs=44%,70%",
        ),
        "compare": Entry(
            "flows.commands.compare:compare",
            "Make the paper's table of methods, or curves of recovery.",
            "espalier compare --preset digits --seeds 0,1,2",
        ),
        "nightly": Entry(
            "flows.commands.nightly:nightly",
            "Compress a commit, register it, and promote it if it is good.",
            "espalier nightly --commit main",
        ),
        "repro": Entry(
            "flows.commands.run:repro",
            "Run `dvc repro` in turn with other runs, with its options.",
            "espalier repro --force-downstream prune",
        ),
    },
    "Look": {
        "report": Entry(
            "stages.tools.verdict_report:report",
            "Print the results against another commit, for a pull request.",
            "espalier report --markdown --against main",
        ),
        "ui": Entry("flows.ui:ui", "Open the recorded compressions in MLflow's pages.", "espalier ui"),
        "diff": Entry(
            "stages.tools.__main__:diff",
            "Print the difference of two evaluations, with intervals.",
            "espalier diff reports/evaluate other/reports/evaluate",
        ),
        "draw": Entry(
            "stages.tools.__main__:draw",
            "Draw images with a model: PNG files, or shards by the thousand.",
            "espalier draw --model artifacts/finetuned --out samples --num-images 8",
        ),
        "grid": Entry(
            "stages.grid.__main__:main",
            "Compare dense and pruned at several steps and guidances.",
            "espalier grid --steps 5,10,20,50 --sampler DDIM --sampler DDIM:trailing",
        ),
        "export": Entry(
            "stages.tools.__main__:export",
            "Write a pruned model as a stock model of diffusers.",
            "espalier export --model artifacts/finetuned --out stock",
        ),
        "lora": Entry(
            "stages.tools.__main__:lora",
            "Slice a LoRA of the dense model for the pruned one.",
            "espalier lora --adapter my-lora --plan artifacts/finetuned/pruning_plan.json --out small-lora",
        ),
    },
    "Registry": {
        "register": Entry(
            "stages.register.__main__:main",
            "Make the finished compression a version of a model.",
            "espalier register",
        ),
        "promote": Entry(
            "flows.commands.registry:promote",
            "Make a version the champion, or print why the gate refuses it.",
            "espalier promote espalier-digits",
        ),
        "rollback": Entry(
            "flows.commands.registry:rollback",
            "Make the previous champion the champion again.",
            "espalier rollback espalier-digits --why 'draws sevens as ones'",
        ),
        "reproduce": Entry(
            "flows.commands.registry:reproduce",
            "Compute a version once more from its commit, and compare.",
            "espalier reproduce models:/espalier-digits/1",
        ),
        "ledger": Entry(
            "flows.commands.registry:ledger",
            "Print who promoted which version, when and why.",
            "espalier ledger espalier-digits",
        ),
        "push": Entry(
            "stages.tools.__main__:push",
            "Push a released model to the Hugging Face Hub.",
            "espalier push artifacts/released/finetuned me/my-small-ddpm --dry-run",
        ),
        "pull": Entry(
            "stages.tools.__main__:pull",
            "Pull a pushed model, and check the hash of every file.",
            "espalier pull me/my-small-ddpm --out my-small-ddpm",
        ),
    },
    "Schedules": {
        "server": Entry(
            "flows.commands.schedules:server", "Start Prefect's server, with a password.", "espalier server"
        ),
        "deploy": Entry(
            "flows.commands.schedules:deploy",
            "Create the deployments of prefect.yaml on the server.",
            "espalier deploy --schedules",
        ),
        "start": Entry(
            "flows.commands.schedules:start",
            "Start a deployment now, and print the address of its page.",
            "espalier start compress --set prune.target.macs=44% --wait",
        ),
    },
    "Tidy": {
        "clean": Entry(
            "flows.clean:clean",
            "List or remove what stopped trainings and runs left behind.",
            "espalier clean --older-than 2w",
        ),
    },
}
