//! Certificates an attacker would like to have: a signing authority and a claim in, PEM files out.
//!
//! Signs either with the lab's real authority, whose key the lab can read, or with one of its own that nobody trusts.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use time::{Duration, OffsetDateTime};

/// Signs what it is asked to.
pub struct Forger {
    issuer: Issuer<'static, KeyPair>,
    issuer_pem: String,
}

/// Files that a TLS client can present.
#[derive(Clone, Debug)]
pub struct Credentials {
    pub chain: PathBuf,
    pub key: PathBuf,
}

impl Forger {
    /// Signs with the authority of a lab.
    pub fn with_authority(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            fs::read_to_string(dir.join(name)).with_context(|| format!("read the authority's {name}"))
        };
        let key = KeyPair::from_pem(&read("ca-key.pem")?)?;
        let issuer_pem = read("ca-cert.pem")?;
        Ok(Self { issuer: Issuer::from_ca_cert_pem(&issuer_pem, key)?, issuer_pem })
    }

    /// Signs with a root that nobody trusts.
    pub fn unknown() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::OrganizationName, "nobody's");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let issuer_pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), issuer_pem })
    }

    /// A certificate for a SPIFFE ID that is valid now.
    pub fn sign(&self, dir: &Path, name: &str, id: &str) -> Result<Credentials> {
        let now = OffsetDateTime::now_utc();
        self.sign_for(dir, name, id, now - Duration::minutes(5), now + Duration::hours(1))
    }

    /// A certificate whose time is over.
    pub fn sign_expired(&self, dir: &Path, name: &str, id: &str) -> Result<Credentials> {
        let now = OffsetDateTime::now_utc();
        self.sign_for(dir, name, id, now - Duration::hours(2), now - Duration::hours(1))
    }

    /// The authority's revocation list with these serial numbers (hexadecimal) in it.
    pub fn revoke(&self, number: u64, serials: &[&str]) -> Result<String> {
        let now = OffsetDateTime::now_utc();
        let entry = |serial: &&str| {
            let digits = serial.as_bytes().chunks(2);
            let bytes = digits.map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?));
            let serial = bytes.collect::<Result<Vec<u8>>>()?;
            Ok(RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            })
        };
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: now + Duration::days(1),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(entry).collect::<Result<_>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.issuer)?.pem()?)
    }

    fn sign_for(
        &self,
        dir: &Path,
        name: &str,
        id: &str,
        from: OffsetDateTime,
        to: OffsetDateTime,
    ) -> Result<Credentials> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.not_before = from;
        params.not_after = to;
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let files =
            Credentials { chain: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}.key")) };
        fs::write(&files.chain, certificate.pem() + &self.issuer_pem)?;
        fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }
}
