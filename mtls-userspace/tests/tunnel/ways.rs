//! The two ways a stream can go.

/// Runs each of these tests on tunnels that carry one stream at a time, and on shared ones.
macro_rules! both_ways {
    (@$way:ident $share_after:expr, $($test:ident),*) => {
        mod $way {
            use crate::world::Agents;

            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    super::$test(Agents::sharing($share_after).await).await;
                }
            )*
        }
    };
    ($($test:ident),* $(,)?) => {
        both_ways!(@alone None, $($test),*);
        both_ways!(@shared Some(0), $($test),*);
    };
}
