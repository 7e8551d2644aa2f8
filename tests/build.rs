//! Compiles the gRPC services that `lab-app` serves and calls, and the container runtime's that the lab calls.

fn main() {
    for (proto, directory) in
        [("app/chat.proto", "app"), ("app/health.proto", "app"), ("cri/cri.proto", "cri")]
    {
        println!("cargo:rerun-if-changed={proto}");
        let descriptors =
            protox::compile([proto], [directory]).unwrap_or_else(|error| panic!("{proto}: {error}"));
        tonic_prost_build::configure().compile_fds(descriptors).expect("cannot generate a service");
    }
}
