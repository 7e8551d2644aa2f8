//! Compiles the gRPC service that `lab-app` serves and calls.

fn main() {
    println!("cargo:rerun-if-changed=app/chat.proto");
    let descriptors = protox::compile(["app/chat.proto"], ["app"]).expect("app/chat.proto does not parse");
    tonic_prost_build::configure().compile_fds(descriptors).expect("cannot generate the chat service");
}
