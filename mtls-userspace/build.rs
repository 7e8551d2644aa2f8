use std::fs;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    protobuf()?;
    bpf_object()?;
    Ok(())
}

/// Compiles the certificate and trust APIs without `protoc`.
fn protobuf() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/ca.proto", "proto/trust.proto"], ["proto"])?;
    tonic_prost_build::configure().build_transport(false).compile_fds(descriptors)?;
    Ok(())
}

/// Puts the BPF object where the kernel half is loaded from: what `cargo xtask build` built last, or the one that
/// MTLS_BPF_OBJECT names. Without one the binary compiles and says so when it starts.
fn bpf_object() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-env-changed=MTLS_BPF_OBJECT");
    let built = Path::new("../target/bpf/mtls-ebpf.o");
    let object = std::env::var_os("MTLS_BPF_OBJECT").map_or(built.into(), PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = match fs::read(&object) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(format!("{}: {error}", object.display()).into()),
    };
    fs::write(Path::new(&std::env::var("OUT_DIR")?).join("mtls-ebpf.o"), bytes)?;
    Ok(())
}
