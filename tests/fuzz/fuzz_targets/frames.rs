//! Any bytes as frames of one tunnel: decoding never panics, what decodes encodes to the same bytes, and a direction
//! that has ended takes nothing more.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mtls_fuzz::tunnel::frame::{Frame, MAX_OPEN, MAX_REJECT};
use mtls_fuzz::tunnel::order::{Order, Role, Version};

fuzz_target!(|input: &[u8]| {
    let Some((&first, mut rest)) = input.split_first() else { return };
    let role = if first & 1 == 0 { Role::Client } else { Role::Server };
    let mut order = match first >> 1 & 3 {
        0 => Order::new(role),
        1 => Order::of_version(role, Version::Raw),
        2 => Order::of_version(role, Version::Shared),
        _ => Order::of_lane(role),
    };
    if first & 1 == 0 {
        order.opened();
    }
    let (mut ended, mut aborted) = (false, false);
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
            _ => {}
        }
        let was_raw = order.inbound_raw();
        let accepted = order.received(&frame).is_ok();
        let abort = frame == Frame::Reset;
        assert!(!(ended && accepted) || (abort && !aborted), "{} after the end", frame.name());
        aborted |= abort && accepted;
        assert!(!(was_raw && accepted), "{} after RAW", frame.name());
        let ends = matches!(frame, Frame::Fin | Frame::Reject(_) | Frame::Reset | Frame::Leave);
        ended |= accepted && ends;
        assert_eq!(order.inbound_ended(), ended);
    }
});
