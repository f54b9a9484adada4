"""The failure modes that the doctor knows, once: title, symptom in a user's words, fix, reference.

When: wherever a finding is made; docs/doctor.md is made of it. Each line of `_TABLE`:

    id | severity | title | symptom | fix | reference

The first letter of an id is its stage. A long table, because it is one.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGE_OF = {
    "D": "data",
    "C": "conversation",
    "T": "template",
    "L": "labels",
    "V": "vision",
    "M": "model",
    "O": "optimisation",
    "E": "evaluation",
    "S": "serving",
}
"""First letter of an id to its stage."""


@dataclass(frozen=True)
class Entry:
    """One failure mode.

    Attributes:
        id: `D01` to `S11`.
        severity: 4 silent and fatal, 3 silent and harmful, 2 loud or partial, 1 minor.
        symptom: what a user sees, in his words.
        unchecked: why no check settles it; "" where one does.
    """

    id: str
    stage: str
    severity: int
    title: str
    symptom: str
    fix: str
    reference: str
    unchecked: str = ""


_TABLE = """
D01 | 4 | Boxes are read with x and y swapped | Boxes are mirrored over the diagonal; IoU stays at .3 to .4; the tuned model is no better than the base | Declare the order that the file really has (yxyx, not xyxy) and convert once, when rows are read; draw eight pictures before training | architecture: boxes.py; seen in practice
D02 | 4 | Width and height are read as a corner | Predicted boxes are tiny or have x2 < x1 | Read the boxes as xywh (COCO) or cxcywh (YOLO) and convert to corners once | COCO format: https://cocodataset.org/#format-data
D03 | 4 | Coordinates are in another unit than the target needs | Boxes are off by a constant factor, less so on small pictures | Convert to the model's space when the target is written: 0-1000 of the picture, or pixels of the resized picture | QwenLM/Qwen3-VL#721
D04 | 4 | Coordinate space of another model family | Training loss is good, boxes are shifted since the model was changed | Qwen2-VL and Qwen3-VL write 0-1000, Qwen2.5-VL pixels of the resized picture, PaliGemma 0-1023 with y first: write the family's own | QwenLM/Qwen3-VL#1486
D05 | 2 | Boxes outside the picture, empty, or at the edge of the grid | Answers hold 1000, negative numbers, or boxes without area | Clip boxes to the picture, drop or mend those without area, round instead of cutting | QwenLM/Qwen3-VL#1035
D06 | 3 | Pictures are turned by EXIF on one side only | Boxes are rotated by 90 degrees on phone photos | Apply the EXIF turn to picture and boxes alike (ImageOps.exif_transpose), once, when rows are read | detectron2 PR#1319
D07 | 2 | Pictures of other modes than RGB | Crashes, or washed-out pictures | Convert to RGB with a white background for transparency; scale 16-bit grey to 8 bits | huggingface/transformers#25694
D08 | 3 | Stored width and height are not those of the file | Some pictures' boxes are shifted | Write the true sizes, or scale the boxes with the picture that was resized | seen in practice
D09 | 4 | The picture is changed and the boxes are not | Raw overlays are right, the trained model's IoU is low | Move the boxes by the same flip, crop or resize as the picture, once | detectron2#1854
D10 | 3 | The same pictures in training and validation | Validation is too good, production is far worse | Split by group (product, scene, video) and remove exact and near duplicates | PlantSeg#11
D11 | 3 | The question and the target name different classes | The model answers another class than it is asked for; IoU 0 on some pictures | Keep in the target what the question asks, or ask for all its classes; unify spellings of labels | seen in practice
D12 | 3 | Not all boxes are in the target | The model never writes more than one box | Write every annotated box into the target | seen in practice
D13 | 2 | Boxes of the targets are in no order | Unstable order, duplicates, high loss on rows with several boxes | Sort boxes, e.g. from top to bottom, then from left to right, in every target | Pix2Seq, arXiv:2109.10852
D14 | 2 | Rows without objects are absent or have an empty answer | The model finds a box on every picture | Add pictures without objects, with a written answer such as an empty list | seen in practice
D15 | 2 | A field or split is not there under this name | KeyError, or the wrong split | Use the names that the rows have | seen in practice
D16 | 3 | Objects are smaller than one image token | Small objects are missed whatever is trained | Raise max_pixels, or cut pictures into tiles | ZonUI-3B#4
D17 | 2 | Pictures that the processor refuses | ValueError on a few pictures, or rows silently skipped | Crop or pad pictures over 200 times as long as wide, enlarge those under 28 pixels | hiyouga/LLaMA-Factory#7690
D18 | 3 | Formatted rows are stale | Edits of the formatter have no effect | Delete the cache or pass load_from_cache_file=False, and write the rows again | datasets: caching
C01 | 4 | Keys that Arrow adds change the rendered conversation | "placeholders=2, images=1", or the model answers garbage | Remove keys that are None before the template, or ask for type == 'image' and not for presence | datasets: Arrow structs
C02 | 3 | Another system message at inference than in training | The model is far worse than its validation loss suggests | Use one function that writes the system message in training, evaluation, callback and server | lmdeploy#3422
C03 | 3 | Another question at inference than in training | The model is far worse than its validation loss suggests | Use one function that writes the question everywhere | seen in practice
C04 | 3 | The question demands another format than the target has | Loss starts high; answers mix two formats | Ask for the format that the target has, best the family's own | QwenLM/Qwen3-VL#762
C05 | 4 | Placeholders and pictures differ in number, or the wrong picture is used | ValueError on tokens and features, or answers to the wrong picture | One placeholder for each picture, in the turn in which the collator looks for it | QwenLM/Qwen3-VL#1616
C06 | 2 | Pictures come as nested lists | "Could not make a flat list of images" | Pass one list of pictures per row, as process_vision_info returns it | qwen-vl-utils
C07 | 4 | A placeholder word stays in the text and no picture is put in | The text holds a literal <image>; the model never sees the picture | Turn the tag into a part {"type": "image"} before the template | QwenLM/Qwen3-VL#342
C08 | 2 | Targets are empty or nearly all the same | The model always gives the same box | Look at how targets are written; add variety | seen in practice
C09 | 3 | Control tokens inside the data's own text | Odd cuts and counts of placeholders on some rows | Escape or remove control tokens in labels and questions | seen in practice
C10 | 1 | The prompt is indented by the code around it | Prompts begin with blanks in every line | Use textwrap.dedent on triple-quoted text | seen in practice
T01 | 4 | Wrong or missing chat template | Gibberish or endless text | Load processor and template of the very base that is trained | QwenLM/Qwen-VL#246
T02 | 3 | Control tokens are doubled | Two BOS at the start; worse answers | Tokenise rendered text with add_special_tokens=False | trl PR#3328
T03 | 4 | Control strings are split into ordinary pieces | Boxes are never closed | Use the tokenizer of the model, or add the tokens as special tokens and train their embeddings | peft#2898
T04 | 3 | Ids over vocab_size are treated as invalid | Structure is never learnt | Compare with len(tokenizer), not with vocab_size: control tokens lie above it | transformers: PreTrainedTokenizerBase.__len__
T05 | 4 | New tokens have no trained or saved embedding | New tokens are random at inference | Resize embeddings in every place, and train and save them (modules_to_save or trainable_token_indices) | peft#2898
T06 | 3 | The saved processor is not the one of training | Works in the notebook, not after reload | Save the processor beside the weights and load it from there | QwenLM/Qwen-VL#302
T07 | 3 | Padding on the wrong side | Batched generation is bad, single is fine | Pad on the left to generate; count masks from the row's first real token | huggingface/transformers#36100
T08 | 4 | Padding is the end token, and both are masked | The model never stops | Mask padding by the attention mask and not by its id, or use another padding token | trl PR#6357
T09 | 4 | max_length cuts pictures or answers | Answers are cut; "Image features and image tokens do not match" | Raise max_length over the longest row, or lower max_pixels | hiyouga/LLaMA-Factory#6559
T10 | 3 | Generation prompt missing at inference, or present in training | The model writes "assistant" first, or nothing | add_generation_prompt=True at inference, False in training | transformers: chat templating
L01 | 4 | The end token is not learnt | Answers repeat boxes until max_new_tokens; decoding is slow | Let the mask include the end token of each answer | trl PR#5988
L02 | 4 | Rows without any token that carries loss | Loss is 0, NaN or does not move | Find the answer by what the template really writes; keep max_length over the row's length | trl#3751
L03 | 4 | Image or padding tokens carry loss | Very low loss, poor boxes | Set labels of image, vision and padding tokens to -100 | hiyouga/LLaMA-Factory#8402
L04 | 4 | The prompt carries loss, or the mask is shifted against the answer | Loss is low from the start, boxes are poor | Measure the prompt on the processed ids of the same row, with the same system message and pictures | architecture: data/collators.py
L05 | 3 | The mask is wrong on some rows | Some rows teach the wrong text | Find the answer by its place in the rendered conversation, not by its first occurrence | unslothai/unsloth#416
L06 | 3 | Only one of several answers is learnt | Only the first (or last) turn is learnt | Let every assistant turn carry loss | seen in practice
L07 | 2 | Most tokens with loss are the same in every row | Loss .15 and the task is poor | Supervise the answers alone, so that losses mean the same between runs | seen in practice
L08 | 4 | Control tokens of the answer are masked | The model never opens or closes boxes | Mask only image and padding tokens, not every special token | seen in practice
L09 | 2 | Only digits carry loss | The model writes digits and no syntax | Let the whole answer carry loss | seen in practice
L10 | 4 | The mask counts from position 0 on rows padded left | Only rows in batches larger than one are wrong | Add the number of padding tokens, or mask by the row's own ids | seen in practice
L11 | 3 | Labels are shifted by the collator | Loss does not fall, though the rate is right | Leave the shift to the model: labels equal ids at their own place | transformers: loss_utils
L12 | 3 | assistant_only_loss has no effect | The prompt carries loss although it was switched off | Use prompt-completion rows or a collator that masks, or a TRL release that supports it | trl#3751
V01 | 4 | Other picture limits in training than in evaluation, base or server | Fine in validation, bad in the app; or the base looks terrible | Use the same min_pixels and max_pixels everywhere, saved with the processor | 2U1/Qwen2-VL-Finetune#77
V02 | 3 | max_pixels has no effect | Out of memory though max_pixels is set | Set size={"shortest_edge", "longest_edge"} of the image processor | huggingface/transformers#41955
V03 | 3 | Pictures are resized twice | Boxes are off by a few pixels up to 2 % | Resize in one place; pass do_resize=False to the second | hiyouga/LLaMA-Factory#8856
V04 | 3 | Far too many image tokens | Ten times as slow, out of memory, worse boxes | Set max_pixels, e.g. 1280 * 28 * 28 | mlx-vlm#1175
V05 | 2 | Image tokens and patches differ in number | A crash at some step: features and tokens do not match | Let the processor expand the placeholders; do not cut rows | hiyouga/LLaMA-Factory#5968
V06 | 4 | The model does not get the picture of its row | The model ignores pictures | Pass pixel_values of the row's own picture, in the order of the rows | trl#4874
V07 | 3 | Pixels are normalised wrongly | Worse than published without any training | RGB order, rescale once, mean and deviation of the processor | transformers: image processors
V08 | 4 | Position ids do not follow height and width | Right on square pictures, wrong on tall ones | Use a release without the fault; check on a picture and its transpose | huggingface/transformers#40136
V09 | 3 | Positions of an earlier call are kept | The first sample is right, later ones are wrong | Update, or reset model.rope_deltas before each call | transformers PR#43952
V10 | 3 | Packing mixes rows | Crash or leakage between rows with packing | Switch packing off for rows with pictures | TRL: packing
V11 | 2 | The test batch holds one row twice | Tests are green, training is wrong | Collate a short, a long and a row of several boxes together | seen in practice
V12 | 3 | max_pixels is set by environment or module variable only | The checkpoint lacks the limits | Set the limits on the processor, and save it | modelscope/ms-swift#3721
M01 | 4 | Nothing is trainable when training starts | Validation loss is constant to six decimals | Do not prepare a model twice; pass peft_config to the trainer or a PeftModel, not both | trl#3926
M02 | 4 | The trainer trains another model than the adapted one | Training works, adapter files are missing | Pass the object that get_peft_model returned; do not load the model again after it | peft: get_peft_model
M03 | 3 | The model carries an adapter of an earlier run | A warning of several adapters; comparisons are contaminated | Load the base anew for each trainer | peft: get_peft_model
M04 | 4 | A target pattern matches nothing | Adding vision LoRA changes nothing | Give one regex as a string, or plain suffixes in a list; look at the match counts | peft#2964
M05 | 3 | A target pattern matches modules that were not meant | Unexpected modules are adapted, or a crash on Conv3d or Dropout | Name the full path with a regex per area | peft#2615
M06 | 3 | A freeze pattern matches nothing | The freeze policy has no effect | Match on today's names (model.visual., model.language_model.layers.) and assert the number | transformers PR#34068
M07 | 3 | Vision tower or merger is quantised | Weak vision after 4-bit loading | llm_int8_skip_modules=["visual", "lm_head"] | unslothai/unsloth#1347
M08 | 4 | Trainable weights get no gradient | "None of the inputs have requires_grad", gradients None | use_reentrant=False, or model.enable_input_require_grads() | peft#1142
M09 | 3 | Several GPUs are used by wrapping a model of one | Half the steps, or a device error | Start with accelerate or torchrun, or show one GPU | trl#921
M10 | 4 | The adapter that is loaded does nothing | The loaded adapter behaves like the base | Compare its names with the model's; missing and unexpected keys must be none | peft#2566
M11 | 4 | The adapter lies on another base than it was trained on | Far worse after reload | Load the base that adapter_config.json names | peft#1468
M12 | 2 | Generation in the callback runs in training mode or without cache | Slow or wrong generation in the evaluation callback | model.eval(), use_cache=True, and back afterwards | peft#1515
M13 | 4 | Vision adapters get no gradient | Vision LoRA does not learn | Do not run the vision tower under no_grad; keep its inputs in the graph | 2U1/Qwen2-VL-Finetune#193
M14 | 2 | The projector does not adapt | The merger stays as it was, though vision and language are trained | Add the merger to the targets | peft: target_modules
M15 | 4 | Weights do not move | All LoRA B stay 0 | A rate above 0, an optimiser made after the adapter | alpaca-lora#352
O01 | 3 | The learning rate is too low for so few steps | Loss is almost flat; validation loss does not decrease | LoRA 1e-4 to 2e-4, full tuning 1e-5; or more steps | QwenLM/Qwen3-VL#1646
O02 | 3 | The learning rate is too high | The model forgets pictures, repeats, hallucinates | Lower the rate by ten, warm up, fewer epochs | QwenLM/Qwen3-VL#600
O03 | 3 | Numbers overflow in half precision | NaN, "!!!!", grad_norm 0 or NaN | Train in bf16, as the checkpoint was | transformers#33294
O04 | 2 | The loss depends on the accumulation | Losses change scale with gradient accumulation | Divide by the number of supervised tokens of all micro batches; take num_items_in_batch | transformers PR#34191
O05 | 3 | The best model cannot be the best | "Best model" is not best | save_steps a multiple of eval_steps, fewer than the planned steps; save_total_limit at least 2 | transformers#28539
O06 | 2 | Warm-up takes most of the run | The rate is at its peak only briefly | warmup of 3 to 10 % of the planned steps | transformers: schedules
O07 | 2 | Evaluation gives no eval_loss | eval_loss is missing, or "metric not found" | label_names=["labels"] in the training arguments | peft#1881
O08 | 3 | Loss falls and IoU does not | Loss improves, boxes do not | Choose checkpoints by IoU or F1 on generated answers | QwenLM/Qwen3-VL#776
O09 | 4 | A later stage does not start where the earlier ended | The later stage forgets the earlier | Merge the earlier stage, or load its adapter as the start | seen in practice
O10 | 4 | Logged values stand still | Validation loss does not decrease: the same value again and again | Look at trainable parameters and gradients (M01, M15) | seen in practice
O11 | 1 | Steps differ from the plan | Other numbers of steps than expected | Count rows / (batch x accumulation x processes) x epochs | transformers: TrainingArguments
E01 | 4 | An exception becomes a score of 0 | The metric is exactly 0 | Count errors apart, fail above a share, and let the first be seen | seen in practice
E02 | 3 | Extra boxes cost nothing | Good IoU, duplicates in the pictures | Match one to one and count false positives | COCO evaluation
E03 | 4 | The parser cannot read the model's own format | Detection rate 0 after training | Parse what the target looks like after the very decoding of the evaluation | hiyouga/LLaMA-Factory#7850
E04 | 3 | The parser loses boxes | Boxes are lost in rows of several | Find all boxes, with any spaces and floats | seen in practice
E05 | 3 | Decoding deletes the control tokens that the parser needs | The server returns text without boxes | skip_special_tokens=False, or a parser that needs none | QwenLM/Qwen3-VL#733
E06 | 3 | max_new_tokens is shorter than targets | The last box is cut | max_new_tokens over the longest target, with room | transformers: generation
E07 | 3 | Answers repeat boxes or run to the limit | The same box again and again | Learn the end token (L01); stop at it; look for over-training | Visual-RFT#29
E08 | 4 | Base and tuned were evaluated under different conditions | An enormous gain, or tuned worse than base | One set of prompts, pixels, dtype and parser for both | QwenLM/Qwen3-VL#1835
E09 | 4 | The evaluator is wrong about IoU | Both models are bad, or both plausible | Test the metric: perfect predictions give 1, swapped ones do not | seen in practice
E10 | 3 | Several predictions match one box | Recall above 1 | Match one to one | COCO evaluation
E11 | 3 | Differences are smaller than chance | Conclusions flip between runs | Bootstrap intervals, paired tests, more pictures | Efron and Tibshirani, 1993
E12 | 3 | Unparsed answers are left out of the mean | The score rises when the parser fails more | Score every picture; an unparsed answer has no box | seen in practice
E13 | 2 | Answers are sampled | Results differ between calls | do_sample=False, model.eval() | transformers: generation
E14 | 3 | Boxes are scaled with the wrong size | Overlays are shifted | Scale with the picture that the numbers refer to: original or resized | QwenLM/Qwen3-VL#1062
E15 | 2 | A wrong class counts as a hit | Classes are mixed up and the figures do not show it | Match within a class | COCO evaluation
E16 | 4 | What was evaluated is the base | Evaluation shows the base's figures after training | Load the adapter, enable it, check that outputs differ | peft#2586
E17 | 2 | The parser guesses the box format | xyxy is parsed as xywh | Declare one format, parse strictly | modelscope/ms-swift#5280
S01 | 4 | The merged model is not base plus adapter | Merged is far worse than the adapter | Merge into the base of adapter_config.json, the whole chain | peft#1836
S02 | 3 | Merged at another precision than trained | Merged is slightly or clearly worse | Merge into the base at the precision it was trained on, in float32 | peft#2105
S03 | 3 | Saved shards are incomplete | Loads, but answers garbage | Save in the main process only; compare with the index | transformers: save_pretrained
S04 | 3 | The server uses another processor | The server's boxes differ | Save the processor of training beside the weights; pass mm_processor_kwargs | vllm#15364
S05 | 4 | The server asks otherwise than training did | The server is worse on the same weights | Send the training's system message and question through the chat endpoint | lmdeploy PR#3475
S06 | 3 | The server ignores vision adapters | Vision LoRA has no effect in the server | Merge before serving | vllm#23796
S07 | 3 | The server does not know the end token | Repeats only in the server | Put the end token into generation_config.json | transformers: generation_config
S08 | 2 | Quantised off the template, or vision quantised | GPTQ or AWQ accuracy falls, or a loader error | Calibrate on rendered training prompts, leave vision out | llm-compressor
S09 | 2 | Throughput counts what was not done | Incredible throughput | Count unique pictures and successes, by the wall clock | seen in practice
S10 | 1 | The server's installation changed libraries | Import errors after installing the server | An environment of its own | seen in practice
S11 | 2 | Several pictures in one request are mixed up | The second picture's boxes are wrong | One picture per request, or check order and sizes | vllm#14662
"""  # noqa: E501  one row a line

_UNCHECKED = {
    "S11": "a running server with pictures of several requests (the catalogue: not on a CPU)",
}


def _read() -> dict[str, Entry]:
    entries = {}
    for line in _TABLE.strip().splitlines():
        identifier, severity, title, symptom, fix, reference = (one.strip() for one in line.split("|"))
        stage = STAGE_OF[identifier[0]]
        entries[identifier] = Entry(
            identifier, stage, int(severity), title, symptom, fix, reference, _UNCHECKED.get(identifier, "")
        )
    return entries


ENTRIES: dict[str, Entry] = _read()
"""Id to its entry, in the order of the catalogue."""
