fn main() -> Result<(), Box<dyn std::error::Error>> {
    protobuf()?;
    Ok(())
}

/// Compiles the certificate API without `protoc`.
fn protobuf() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/ca.proto"], ["proto"])?;
    tonic_prost_build::configure().build_transport(false).compile_fds(descriptors)?;
    Ok(())
}
