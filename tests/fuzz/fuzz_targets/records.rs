//! Any bytes as records: measuring and opening never panic, nothing forged opens, and what was sealed does.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mtls_fuzz::tunnel::record::{ContentType, Opener, Sealer, whole_record};
use rustls::ConnectionTrafficSecrets;
use rustls::crypto::cipher::{AeadKey, Iv};

fn secrets(cipher: u8) -> ConnectionTrafficSecrets {
    let (key, iv) = (AeadKey::from([7; 32]), Iv::from([9; 12]));
    match cipher % 3 {
        0 => ConnectionTrafficSecrets::Aes128Gcm { key, iv },
        1 => ConnectionTrafficSecrets::Aes256Gcm { key, iv },
        _ => ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv },
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&cipher, stream)) = input.split_first() else { return };
    let secrets = secrets(cipher);
    let mut sealer = Sealer::new(0, &secrets).expect("a known cipher");
    let mut opener = Opener::new(0, &secrets).expect("a known cipher");

    // The bytes as they are: no key of ours sealed them.
    if let Ok(Some(length)) = whole_record(stream) {
        let mut record = stream[..length].to_vec();
        assert!(Opener::new(0, &secrets).expect("a known cipher").open(&mut record).is_err());
    }

    // The bytes as content, in records of any size; then one of them changed.
    let mut rest = stream;
    while let Some((&size, tail)) = rest.split_first() {
        let (content, tail) = tail.split_at(usize::from(size).min(tail.len()));
        rest = tail;
        let mut record = vec![0; 5 + content.len() + 17];
        record[5..5 + content.len()].copy_from_slice(content);
        let n = sealer
            .seal(&mut record, content.len(), ContentType::ApplicationData)
            .expect("room for the record");
        assert_eq!(whole_record(&record), Ok(Some(n)));
        let mut changed = record.clone();
        changed[usize::from(size) % n] ^= 1;
        let mut twin = Opener::new(sealer.sequence() - 1, &secrets).expect("a known cipher");
        assert!(twin.open(&mut changed).is_err());
        let (kind, range) = opener.open(&mut record).expect("sealed by us");
        assert_eq!((kind, &record[range]), (ContentType::ApplicationData, content));
    }
});
