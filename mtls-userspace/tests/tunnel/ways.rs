//! The two ways a stream can go.

/// Runs each of these tests on tunnels that carry one stream at a time, and on shared ones.
macro_rules! both_ways {
    (@$way:ident $config:expr, $($test:ident),*) => {
        mod $way {
            use crate::world::Agents;

            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    super::$test(Agents::with($config).await).await;
                }
            )*
        }
    };
    ($($test:ident),* $(,)?) => {
        both_ways!(@alone crate::world::alone(), $($test),*);
        both_ways!(@shared mtls::tunnel::Config::default(), $($test),*);
    };
}
