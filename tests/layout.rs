//! Which tensors become which experts, at the edges of the rules; and the models that are refused.

use std::io::Cursor;

use odmoe_fs::codec::Float;
use odmoe_fs::explain::Explain;
use odmoe_fs::form::Form;
use odmoe_fs::gguf::write::Writer;
use odmoe_fs::gguf::{GgmlType, Header, ModelHeader, Value};
use odmoe_fs::layout::{FileKind, Layout, LayoutError};

type Tensor<'a> = (&'a str, &'a [u64], &'a str);

fn lay_out(tensors: &[Tensor]) -> Result<Layout, LayoutError> {
    lay_out_of("moe", tensors)
}

fn lay_out_of(architecture: &str, tensors: &[Tensor]) -> Result<Layout, LayoutError> {
    lay_out_as(Form::Raw, architecture, tensors)
}

fn lay_out_as(form: Form, architecture: &str, tensors: &[Tensor]) -> Result<Layout, LayoutError> {
    let mut writer = Writer::new();
    writer.key_value("general.architecture", &Value::String(architecture.into()));
    for (name, dims, ggml_type) in tensors {
        writer.tensor(name, dims, GgmlType::from_name(ggml_type).unwrap());
    }
    let written = writer.header();
    let header = Header::read(Cursor::new(&written.bytes), written.file_bytes).unwrap();
    let model = ModelHeader::join(vec![(header, written.file_bytes)]).unwrap();
    Layout::new(model, form).map(|(layout, _)| layout)
}

/// `file: name [shape] at byte of its tensor`, for each tensor of each file.
fn listing(tensors: &[Tensor]) -> Vec<String> {
    let layout = lay_out(tensors).unwrap();
    let mut lines = Vec::new();
    for file in layout.files() {
        for view in layout.tensors(file) {
            let mut all = layout.model().tensors.iter();
            let tensor = all.find(|t| t.info.name == view.gguf_name).unwrap();
            let file = match file.kind {
                FileKind::Base(component) => component.name().to_owned(),
                FileKind::Expert { layer, expert } => format!("{layer}/{expert}"),
            };
            let at = view.gguf_offset - tensor.info.offset;
            lines.push(format!(
                "{file}: {} {:?} at {at}",
                view.name,
                view.shape.dims()
            ));
        }
    }
    lines
}

fn refusal(tensors: &[Tensor]) -> String {
    lay_out(tensors).unwrap_err().line()
}

#[test]
fn biases_and_scales_are_sliced_with_their_weights() {
    assert_eq!(
        listing(&[
            ("blk.0.ffn_up_exps.weight", &[32, 4, 2], "Q8_0"),
            ("blk.0.ffn_up_exps.bias", &[4, 2], "F32"),
            ("blk.0.ffn_up_exps.scale", &[2], "F32"),
        ]),
        [
            "0/0: w3.weight [4, 32] at 0",
            "0/0: w3.bias [4] at 0",
            "0/0: w3.scale [] at 0",
            "0/1: w3.weight [4, 32] at 136",
            "0/1: w3.bias [4] at 16",
            "0/1: w3.scale [] at 4",
        ]
    );
}

#[test]
fn scales_that_are_called_those_of_the_weight_are_scales() {
    assert_eq!(
        listing(&[
            ("blk.0.ffn_up_exps.weight", &[64, 4, 2], "NVFP4"),
            ("blk.0.ffn_up_exps.weight.scale", &[2], "F32"),
            ("blk.0.ffn_up_exps.weight.input_scale", &[2], "F32"),
            ("blk.1.ffn_gate_up_exps.weight", &[64, 4, 2], "NVFP4"),
            ("blk.1.ffn_gate_up_exps.weight.scale", &[2], "F32"),
            ("blk.2.ffn_down.5.weight", &[64, 4], "NVFP4"),
            ("blk.2.ffn_down.5.weight.scale", &[], "F32"),
        ]),
        [
            "attention_layers: blk.1.ffn_gate_up_exps.weight.scale [2] at 0",
            "0/0: w3.weight [4, 64] at 0",
            "0/0: w3.scale [] at 0",
            "0/0: w3.input_scale [] at 0",
            "0/1: w3.weight [4, 64] at 144",
            "0/1: w3.scale [] at 4",
            "0/1: w3.input_scale [] at 4",
            "1/0: w1.weight [2, 64] at 0",
            "1/0: w3.weight [2, 64] at 72",
            "1/1: w1.weight [2, 64] at 144",
            "1/1: w3.weight [2, 64] at 216",
            "2/5: w2.weight [4, 64] at 0",
            "2/5: w2.scale [] at 0",
        ]
    );
}

#[test]
fn a_fused_stack_is_halved_gate_first() {
    assert_eq!(
        listing(&[
            ("blk.0.ffn_gate_up_exps.weight", &[8, 6, 2], "F32"),
            ("blk.0.ffn_gate_up_exps.bias", &[6, 2], "F32"),
            ("blk.0.ffn_gate_up_exps.scale", &[2], "F32"),
        ]),
        [
            "attention_layers: blk.0.ffn_gate_up_exps.scale [2] at 0",
            "0/0: w1.weight [3, 8] at 0",
            "0/0: w3.weight [3, 8] at 96",
            "0/0: w1.bias [3] at 0",
            "0/0: w3.bias [3] at 12",
            "0/1: w1.weight [3, 8] at 192",
            "0/1: w3.weight [3, 8] at 288",
            "0/1: w1.bias [3] at 24",
            "0/1: w3.bias [3] at 36",
        ]
    );
}

#[test]
fn a_dropped_expert_dimension_means_one_expert() {
    assert_eq!(
        listing(&[
            ("blk.0.ffn_up_exps.weight", &[8, 6], "F32"),
            ("blk.0.ffn_up_exps.bias", &[6], "F32"),
            ("blk.0.ffn_up_exps.scale", &[], "F32"),
        ]),
        [
            "0/0: w3.weight [6, 8] at 0",
            "0/0: w3.bias [6] at 0",
            "0/0: w3.scale [] at 0",
        ]
    );
}

#[test]
fn a_tensor_without_one_entry_per_expert_stays_in_the_base_under_its_own_name() {
    let in_base = |line: &String| line.starts_with("attention_layers: ");
    let lines = listing(&[
        ("blk.0.ffn_up_exps.weight", &[32, 4, 2], "F32"),
        ("blk.0.ffn_up_exps.bias", &[4, 3], "F32"),
        ("blk.0.ffn_up_exps.scale", &[3], "F32"),
        ("blk.0.ffn_up_exps.input_scale", &[2, 2], "F32"),
        ("blk.1.ffn_up_exps.scale", &[2], "F32"),
        ("blk.2.ffn_up_exps.weight", &[32, 0, 5], "F32"),
    ]);
    assert_eq!(lines.iter().filter(|line| in_base(line)).count(), 5);
    assert_eq!(lines.len(), 5 + 2);
}

#[test]
fn stacks_and_single_experts_of_a_layer_add_up() {
    assert_eq!(
        listing(&[
            ("blk.0.ffn_up_exps.weight", &[4, 4, 2], "F32"),
            ("blk.0.ffn_down.1.weight", &[4, 4], "F32"),
            ("blk.0.ffn_down.7.weight", &[4, 4], "F32"),
        ]),
        [
            "0/0: w3.weight [4, 4] at 0",
            "0/1: w3.weight [4, 4] at 64",
            "0/1: w2.weight [4, 4] at 0",
            "0/7: w2.weight [4, 4] at 0",
        ]
    );
}

#[test]
fn a_file_is_ordered_by_dtype_width_only_where_alignment_needs_it() {
    let names = |tensors: &[Tensor]| -> Vec<String> {
        let layout = lay_out(tensors).unwrap();
        let views = layout.tensors(&layout.files()[0]);
        views.map(|view| view.name.to_owned()).collect()
    };
    let aligned: &[Tensor] = &[("a", &[2], "F16"), ("b", &[2], "F32"), ("c", &[1], "I8")];
    assert_eq!(names(aligned), ["a", "b", "c"]);
    let odd: &[Tensor] = &[
        ("a", &[3], "I8"),
        ("b", &[2], "F16"),
        ("c", &[1], "F64"),
        ("d", &[1], "I16"),
    ];
    assert_eq!(names(odd), ["c", "b", "d", "a"]);
}

#[test]
fn experts_times_suffixes_cannot_eat_the_memory() {
    let names: Vec<String> = (0..100)
        .map(|n| format!("blk.7.ffn_up_exps.x{n}"))
        .collect();
    let mut tensors: Vec<Tensor> = names
        .iter()
        .map(|n| (&n[..], &[65_536][..], "I8"))
        .collect();
    tensors.push(("blk.7.ffn_up_exps.weight", &[1, 1, 65_536], "I8"));
    assert_eq!(
        refusal(&tensors),
        "the experts up to layer 7 hold 6619136 tensors together, more than any real model; if this is a real model, report it to odmoe-fs"
    );
}

const FUSED: Tensor = ("blk.3.ffn_gate_up_exps.weight", &[32, 4, 2], "F32");
const DOWN: Tensor = ("blk.3.ffn_down_exps.weight", &[32, 32, 2], "MXFP4");

#[test]
fn rows_that_alternate_as_in_ollamas_gpt_oss_are_refused() {
    let refusal = |architecture, tensors: &[Tensor]| {
        let refused = lay_out_of(architecture, tensors);
        refused.map_or_else(|e| e.line(), |_| String::new())
    };
    let sinks = ("blk.0.attn_sinks", &[8][..], "F32");
    for (architecture, tensors, sign) in [
        (
            "gptoss",
            &[FUSED, DOWN][..],
            r#"general.architecture is "gptoss""#,
        ),
        (
            "gptoss",
            &[DOWN, sinks, FUSED],
            r#"general.architecture is "gptoss""#,
        ),
        (
            "gpt-oss",
            &[FUSED, sinks],
            r#""blk.0.attn_sinks" has no suffix"#,
        ),
        (
            "moe",
            &[sinks, FUSED],
            r#""blk.0.attn_sinks" has no suffix"#,
        ),
    ] {
        let expected = format!(
            r#"tensor "blk.3.ffn_gate_up_exps.weight" [32, 4, 2] F32 holds gate and up rows in turn, as Ollama writes gpt-oss ({sign}); take llama.cpp's file of the model, whose general.architecture is "gpt-oss""#
        );
        assert_eq!(refusal(architecture, tensors), expected);
    }
}

#[test]
fn separate_stacks_and_fused_ones_of_llama_cpp_are_shown() {
    let gate = ("blk.3.ffn_gate_exps.weight", &[32, 2, 2][..], "MXFP4");
    let up = ("blk.3.ffn_up_exps.weight", &[32, 2, 2][..], "MXFP4");
    let bias = ("blk.4.ffn_gate_up_exps.bias", &[4, 2][..], "F32");
    let sinks = ("blk.0.attn_sinks", &[8][..], "F32");
    let weight = ("blk.0.attn_sinks.weight", &[8][..], "F32");
    let vision = ("v.blk.0.attn_sinks", &[8][..], "F32");
    for (architecture, tensors) in [
        // As newer versions of Ollama write it.
        ("gptoss", &[gate, up, DOWN, sinks][..]),
        // Stays in the base, as it is, since nothing tells its number of experts.
        ("gptoss", &[bias]),
        ("gpt-oss", &[FUSED, DOWN, weight]),
        ("gpt-oss", &[FUSED, DOWN, vision]),
        ("moe", &[FUSED]),
    ] {
        let layout = lay_out_of(architecture, tensors).unwrap();
        assert_eq!(layout.experts().is_empty(), tensors == [bias]);
    }
}

#[test]
fn models_without_a_layout_are_refused_with_their_tensors_named() {
    for (tensors, expected) in [
        (
            &[
                ("blk.3.ffn_up_exps.weight", &[8, 4, 2][..], "F32"),
                ("blk.3.ffn_down_exps.weight", &[4, 8, 3], "F32"),
            ][..],
            r#"tensor "blk.3.ffn_up_exps.weight" [8, 4, 2] F32 and tensor "blk.3.ffn_down_exps.weight" [4, 8, 3] F32 are of the same layer, but disagree on the number of experts; the converter wrote it so: convert the model again, or tell its publisher"#,
        ),
        (
            &[
                ("blk.3.ffn_up_exps.weight", &[8, 4, 2], "F32"),
                ("blk.3.ffn_up.1.weight", &[8, 4], "F32"),
            ],
            r#"w3.weight of the same expert comes from both tensor "blk.3.ffn_up_exps.weight" [8, 4, 2] F32 and tensor "blk.3.ffn_up.1.weight" [8, 4] F32; the converter wrote it so: convert the model again, or tell its publisher"#,
        ),
        (
            &[
                ("blk.3.ffn_gate_up_exps.weight", &[8, 4, 2], "F32"),
                ("blk.3.ffn_gate_exps.weight", &[8, 2, 2], "F32"),
            ],
            r#"w1.weight of the same expert comes from both tensor "blk.3.ffn_gate_up_exps.weight" [8, 4, 2] F32 and tensor "blk.3.ffn_gate_exps.weight" [8, 2, 2] F32; the converter wrote it so: convert the model again, or tell its publisher"#,
        ),
        (
            &[
                ("blk.3.ffn_up.1.weight", &[8, 4], "F32"),
                ("blk.3.ffn.experts.1.w3.weight", &[8, 4], "F32"),
            ],
            r#"w3.weight of the same expert comes from both tensor "blk.3.ffn_up.1.weight" [8, 4] F32 and tensor "blk.3.ffn.experts.1.w3.weight" [8, 4] F32; the converter wrote it so: convert the model again, or tell its publisher"#,
        ),
        (
            &[
                ("blk.3.ffn_up_exps.weight", &[64, 4, 2], "NVFP4"),
                ("blk.3.ffn_up_exps.scale", &[2], "F32"),
                ("blk.3.ffn_up_exps.weight.scale", &[2], "F32"),
            ],
            r#"w3.scale of the same expert comes from both tensor "blk.3.ffn_up_exps.scale" [2] F32 and tensor "blk.3.ffn_up_exps.weight.scale" [2] F32; the converter wrote it so: convert the model again, or tell its publisher"#,
        ),
        (
            &[("blk.3.ffn_up_exps.weight", &[8, 4, 2, 2], "F32")],
            r#"tensor "blk.3.ffn_up_exps.weight" [8, 4, 2, 2] F32 has a fourth dimension, but experts are stacked along the third; the converter wrote it so: convert the model again, or tell its publisher"#,
        ),
        (
            &[("blk.3.ffn_gate_up_exps.weight", &[8, 5, 2], "F32")],
            r#"tensor "blk.3.ffn_gate_up_exps.weight" [8, 5, 2] F32 should hold gate and up rows, half of each, but has an odd number of rows; the converter wrote it so: convert the model again, or tell its publisher"#,
        ),
        (
            &[("blk.3.ffn_up_exps.weight", &[256, 6, 2], "Q4_K_R4")],
            r#"tensor "blk.3.ffn_up_exps.weight" [256, 6, 2] Q4_K_R4 interleaves 4 rows, but one expert's matrix has 6, which is not a multiple of that; quantise the model to a type without _R4"#,
        ),
        (
            &[("blk.3.ffn_gate_up_exps.weight", &[256, 12, 2], "Q4_K_R4")],
            r#"tensor "blk.3.ffn_gate_up_exps.weight" [256, 12, 2] Q4_K_R4 interleaves 4 rows, but one expert's matrix has 6, which is not a multiple of that; quantise the model to a type without _R4"#,
        ),
        (
            &[("__metadata__", &[1], "F32")],
            r#"a tensor is called "__metadata__", which safetensors reserves; rename it"#,
        ),
        (
            &[("blk.0.ffn_up_exps.weight", &[1, 1, 65_537], "I8")],
            "layer 0 has 65537 experts, which makes 65537 or more in all, more than any real model; if this is a real model, report it to odmoe-fs",
        ),
    ] {
        assert_eq!(refusal(tensors), expected);
    }
}

#[test]
fn arrays_of_one_name_are_refused_in_the_form_that_makes_them() {
    let tensors = [
        ("blk.0.x.weight", &[256, 2][..], "Q4_K"),
        ("blk.0.x.scales", &[2][..], "F32"),
    ];
    let refused = lay_out_as(Form::MLX, "moe", &tensors).unwrap_err();
    assert_eq!(
        refused.line(),
        "\"blk.0.x.weight\" and \"blk.0.x.scales\" would both be shown as blk.0.x.scales; \
         use another form, or --as raw"
    );
    assert_eq!(refused.code(), "layout.same_name");
    for form in [Form::Raw, Form::Numbers(Float::F32)] {
        lay_out_as(form, "moe", &tensors).unwrap();
    }
    // Of a packed expert, too.
    let tensors = [
        ("blk.0.ffn_up_exps.weight", &[256, 2, 3][..], "Q4_K"),
        ("blk.0.ffn_up_exps.biases", &[3][..], "F32"),
    ];
    let refused = lay_out_as(Form::MLX, "moe", &tensors).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("would both be shown as w3.biases")
    );
}

#[test]
fn what_would_be_larger_than_any_file_is_refused_in_that_form() {
    // 2^64 numbers of 1.5625 bits are less than 2^63 bytes.
    let tensors = [("blk.0.x.weight", &[1 << 40, 1 << 22][..], "IQ1_S")];
    for form in [Form::Numbers(Float::F32), Form::Numbers(Float::Bf16)] {
        let refused = lay_out_as(form, "moe", &tensors).unwrap_err();
        let name = form.name();
        let path = "base_model/attention_layers.safetensors";
        assert_eq!(
            refused.line(),
            format!(
                "shown as {name}, {path} would be larger than any file system can hold; use --as raw"
            )
        );
        assert_eq!(refused.code(), "layout.too_large");
    }
    for form in [Form::Raw, Form::MLX] {
        lay_out_as(form, "moe", &tensors).unwrap();
    }
}
