//! Any bytes as frames of one tunnel: decoding never panics, what decodes encodes to the same bytes, and a direction
//! that has ended takes nothing more.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mtls_fuzz::tunnel::frame::{Frame, MAX_OPEN, MAX_REJECT};
use mtls_fuzz::tunnel::order::{Order, Role};

fuzz_target!(|input: &[u8]| {
    let Some((&first, mut rest)) = input.split_first() else { return };
    let role = if first & 1 == 0 { Role::Client } else { Role::Server };
    let mut order = if first & 2 == 0 { Order::new(role) } else { Order::with_raw(role) };
    if first & 1 == 0 {
        order.opened();
    }
    let mut ended = false;
    while let Some((&length, tail)) = rest.split_first() {
        let (content, tail) = tail.split_at(usize::from(length).min(tail.len()));
        rest = tail;
        let Ok(frame) = Frame::decode(content) else { continue };
        match &frame {
            Frame::Open(open) => {
                let mut out = [0; MAX_OPEN];
                let n = open.encode(&mut out);
                // An IPv4-mapped address is written as the IPv4 address it is.
                assert!(n <= content.len());
                assert_eq!(Frame::decode(&out[..n]).as_ref(), Ok(&frame));
            }
            Frame::Reject(rejection) => {
                let mut out = [0; MAX_REJECT];
                let n = rejection.encode(&mut out);
                assert_eq!(&out[..n], content);
            }
            Frame::Data(data) => assert_eq!(*data, &content[1..]),
            Frame::Fin | Frame::Raw => {}
        }
        let was_raw = order.inbound_raw();
        let accepted = order.received(&frame).is_ok();
        assert!(!(ended && accepted), "{} after the end", frame.name());
        assert!(!(was_raw && accepted), "{} after RAW", frame.name());
        ended |= accepted && matches!(frame, Frame::Fin | Frame::Reject(_));
        assert_eq!(order.inbound_ended(), ended);
    }
});
