"""The examples in each command's help: (command line, what it does)."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("fp4cast demo", "See it work, on miniatures, in seconds."),
        ("fp4cast inspect openai/gpt-oss-20b", "Say what would happen."),
        ("fp4cast convert openai/gpt-oss-20b gpt-oss-20b-NVFP4", "Do it."),
    ),
    "inspect": (
        ("fp4cast inspect openai/gpt-oss-20b", "Can every value be kept? Who serves the result?"),
        ("fp4cast inspect SRC --json", "Each scale domain, for scripts."),
    ),
    "convert": (
        ("fp4cast convert openai/gpt-oss-20b gpt-oss-20b-NVFP4", "Cast every MXFP4 weight, and compare every value."),
        (
            "fp4cast convert SRC DST --activations w4a4 --input-scales amax.json",
            "With `calibrate`'s activation scales.",
        ),
        (
            "fp4cast convert ORG/NAME DST --stream --push ME/NAME-NVFP4",
            "On a disk for DST and a few shards; then upload DST, once you agreed.",
        ),
        ("fp4cast convert SRC.gguf DST.gguf", "For llama.cpp, which reads GGUF."),
        ("fp4cast convert SRC DST --shards 2/8", "The second of eight parts; --finish publishes them."),
        ("fp4cast convert NVFP4 MXFP4 --to mxfp4", "The way back."),
    ),
    "verify": (
        ("fp4cast verify SRC DST", "Compare every value with the source's."),
        ("fp4cast verify DST", "After a copy: are the files what was written?"),
        ("fp4cast verify SRC DST --strict --quiet", "For scripts: the exit status says it."),
    ),
    "push": (("fp4cast push DST ME/NAME-NVFP4", "Into a private repository, once you agreed."),),
    "card": (("fp4cast card SRC DST --source-id openai/gpt-oss-20b", "Name the source that SRC is a copy of."),),
    "calibrate": (
        ("fp4cast calibrate SRC --out amax.json --dataset text.txt", "On a text file."),
        (
            "fp4cast calibrate SRC --out amax.safetensors --dataset a.jsonl,b.txt --calib-size 256,128",
            "On two files, with a number of samples for each.",
        ),
    ),
    "ptq": (
        (
            "fp4cast ptq --pyt-ckpt-path SRC --export-path DST --qformat nvfp4_mlp_only --cast-mxfp4-to-nvfp4 "
            "--dataset text.txt",
            "Weights cast exactly, activations calibrated.",
        ),
        (
            "fp4cast ptq --pyt-ckpt-path SRC --export-path DST --qformat nvfp4_mlp_weight_only --cast-mxfp4-to-nvfp4",
            "Weights alone: no data is needed.",
        ),
    ),
    "study": (("fp4cast study --out study", "Write the page, with tables and pictures."),),
    "demo": (
        ("fp4cast demo", "Nothing stays."),
        ("fp4cast demo --out miniatures", "Keep them to look at."),
    ),
    "env": (("fp4cast env --json", "Paste it into a bug report."),),
}
