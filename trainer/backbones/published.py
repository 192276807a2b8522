"""Published configurations of CogVideoX, so that a run can be planned or measured without any download.

Source: the `config.json` files of the THUDM/zai-org model repositories; fields left out have diffusers' defaults.
"""

_TRANSFORMER_5B = dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
TRANSFORMERS = {
    "cogvideox-2b": dict(num_attention_heads=30, num_layers=30),
    "cogvideox-5b": _TRANSFORMER_5B,
    "cogvideox1.5-5b": _TRANSFORMER_5B | dict(
        patch_size_t=2, patch_bias=False, sample_frames=81, sample_height=300, sample_width=300),
}
HUB_IDS = {"cogvideox-2b": "THUDM/CogVideoX-2b", "cogvideox-5b": "THUDM/CogVideoX-5b", "cogvideox1.5-5b": "THUDM/CogVideoX1.5-5B"}
NATIVE_DTYPES = {"cogvideox-2b": "float16", "cogvideox-5b": "bfloat16", "cogvideox1.5-5b": "bfloat16"}
SIZES = {  # frames, height, width in pixels
    "cogvideox-2b": (49, 480, 720), "cogvideox-5b": (49, 480, 720), "cogvideox1.5-5b": (81, 768, 1360)}
VAES = {
    "cogvideox-2b": dict(scaling_factor=1.15258426),
    "cogvideox-5b": dict(scaling_factor=0.7),
    "cogvideox1.5-5b": dict(scaling_factor=0.7),
}
_SCHEDULER = dict(
    num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    clip_sample=False, set_alpha_to_one=True,
)
SCHEDULERS = {
    "cogvideox-2b": ("CogVideoXDDIMScheduler", _SCHEDULER | dict(snr_shift_scale=3.0)),
    "cogvideox-5b": ("CogVideoXDPMScheduler", _SCHEDULER | dict(snr_shift_scale=1.0)),
    "cogvideox1.5-5b": ("CogVideoXDPMScheduler", _SCHEDULER | dict(snr_shift_scale=1.0)),
}
T5_XXL = dict(  # google/t5-v1_1-xxl, encoder only
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128,
    feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False)
