//! Requests are carried out: from a message to the endpoint, and to the reply.

use nix::errno::Errno;
use vfio_bindings::bindings::vfio as v;

use super::connection::{Broken, FdsLost, Message};
use super::protocol::{
    Capabilities, Header, IrqAction, IrqData, MAX_FDS, Request, RequestError, SetIrqs, WriteOne,
    command, errno_of, error_reply, invalid, offer, reply, version_reply,
};
use super::transport::{Ended, Endpoint, IRQ_INDICES, IrqRequest, REGIONS, Region, vectors};
use crate::memory::Rights;

/// Refused requests of a session that are told on standard error.
const MAX_TOLD: u32 = 20;

/// Sends a reply.
pub(super) type Send<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), Broken>;

/// One session's requests.
pub(super) struct Dispatcher<'a> {
    endpoint: &'a mut dyn Endpoint,
    /// What the client can do, once it has said so.
    client: Option<Capabilities>,
    told: u32,
    name: String,
}

impl<'a> Dispatcher<'a> {
    pub(super) fn new(endpoint: &'a mut dyn Endpoint, name: &str) -> Self {
        Self {
            endpoint,
            client: None,
            told: 0,
            name: name.to_owned(),
        }
    }

    /// Goes on with a client that has said this of itself, without telling of what is refused.
    pub(super) fn resume(endpoint: &'a mut dyn Endpoint, client: Option<Capabilities>) -> Self {
        Self {
            endpoint,
            client,
            told: MAX_TOLD,
            name: String::new(),
        }
    }

    /// What the client has said of itself.
    pub(super) fn into_client(self) -> Option<Capabilities> {
        self.client
    }

    /// What the client can do, once it has said so.
    pub(super) fn client(&self) -> Option<&Capabilities> {
        self.client.as_ref()
    }

    /// Carries a message out, and answers it if it wants an answer.
    pub(super) fn handle(&mut self, message: Message, send: Send<'_>) -> Result<(), Ended> {
        let header = message.header;
        if !header.is_command() {
            // A reply to a reply is not possible: nothing was asked.
            let why = match header.is_reply() {
                true => "the client answered what nobody asked",
                false => "a message is neither a command nor a reply",
            };
            return Err(Ended::Protocol(why.into()));
        }
        if self.client.is_none() && header.command != command::VERSION {
            send(&error_reply(&header, Errno::EPROTO))?;
            let why = "the client did not say its version first";
            return Err(Ended::Protocol(why.into()));
        }
        // Not even a refusal: nobody would know what it answers.
        let posted = header.wants_no_reply();
        match self.carry_out(message) {
            Ok(body) if !posted => send(&reply(&header, &body))?,
            Ok(_) => {}
            Err(error) => {
                self.tell(&header, &error);
                if !posted {
                    send(&error_reply(&header, error.0))?;
                }
                if self.client.is_none() {
                    return Err(Ended::Protocol(error.1));
                }
            }
        }
        Ok(())
    }

    /// Says why a request was refused, though not without end.
    fn tell(&mut self, header: &Header, RequestError(errno, why): &RequestError) {
        self.told = self.told.saturating_add(1);
        if self.told <= MAX_TOLD {
            let (name, number) = (&self.name, header.command);
            eprintln!("extlb-device: {name}: command {number} was refused: {why} ({errno})");
        }
        if self.told == MAX_TOLD {
            eprintln!("extlb-device: {}: no further refusals are told", self.name);
        }
    }

    /// The body of the reply, or why the request is refused.
    fn carry_out(&mut self, message: Message) -> Result<Vec<u8>, RequestError> {
        let Message {
            header,
            body,
            fds,
            fds_lost,
        } = message;
        // Those that are refused are closed when `fds` goes.
        let fds_good = match fds_lost {
            Some(FdsLost::TooMany) => Err(RequestError(
                Errno::E2BIG,
                "more file descriptors than max_msg_fds".into(),
            )),
            Some(FdsLost::NoRoom) => Err(RequestError(
                Errno::EMFILE,
                "no more file descriptors can be received".into(),
            )),
            None if !fds.is_empty() && !Request::takes_fds(header.command) => {
                Err(invalid("file descriptors with a command that takes none"))
            }
            None => Ok(()),
        };
        fds_good?;
        self.request(Request::parse(header.command, &body)?, &body, fds)
    }

    fn request(
        &mut self,
        request: Request<'_>,
        body: &[u8],
        mut fds: Vec<std::os::fd::OwnedFd>,
    ) -> Result<Vec<u8>, RequestError> {
        let endpoint = &mut *self.endpoint;
        match request {
            Request::Version { major, minor, data } => {
                if self.client.is_some() {
                    return Err(invalid("the client said its version already"));
                }
                let (client, said) = offer(major, data)?;
                self.client = Some(client);
                Ok(version_reply(minor, &said))
            }
            Request::DeviceInfo => {
                let flags = v::VFIO_DEVICE_FLAGS_RESET | v::VFIO_DEVICE_FLAGS_PCI;
                Ok(words(&[16, flags, REGIONS, IRQ_INDICES]))
            }
            Request::RegionInfo { index } if index < REGIONS => {
                let size = Region::of(index).map_or(0, Region::size);
                let flags = match size {
                    0 => 0,
                    // None may be mapped: one such region makes QEMU wait for the reply to each
                    // write.
                    _ => v::VFIO_REGION_INFO_FLAG_READ | v::VFIO_REGION_INFO_FLAG_WRITE,
                };
                let (low, high) = (size as u32, (size >> 32) as u32);
                Ok(words(&[32, flags, index, 0, low, high, 0, 0]))
            }
            Request::RegionInfo { .. } => Err(invalid("no such region")),
            Request::IrqInfo { index } if index < IRQ_INDICES => {
                let count = vectors(index);
                let flags = match count {
                    0 => 0,
                    _ => {
                        v::VFIO_IRQ_INFO_EVENTFD
                            | v::VFIO_IRQ_INFO_MASKABLE
                            | v::VFIO_IRQ_INFO_NORESIZE
                    }
                };
                Ok(words(&[16, flags, index, count]))
            }
            Request::IrqInfo { .. } => Err(invalid("no such interrupts")),
            Request::RegionRead {
                region: index,
                offset,
                count,
            } => {
                let region = region(index, offset, count)?;
                let mut reply = body.to_vec();
                // At most `MAX_DATA`, and within the region.
                reply.resize(reply.len() + count, 0);
                let data = reply.get_mut(body.len()..).unwrap_or_default();
                endpoint.read(region, offset, data).map_err(refused)?;
                Ok(reply)
            }
            Request::RegionWrite {
                region: index,
                offset,
                data,
            } => {
                let region = region(index, offset, data.len())?;
                endpoint.write(region, offset, data).map_err(refused)?;
                Ok(body.get(..16).unwrap_or_default().to_vec())
            }
            Request::RegionWriteMulti(writes) => {
                // All or nothing: which of them were carried out the reply could not tell.
                let place = |w: &WriteOne<'_>| region(w.region, w.offset, w.data.len());
                let places = writes.iter().map(place).collect::<Result<Vec<_>, _>>()?;
                for (write, region) in writes.iter().zip(places) {
                    let written = endpoint.write(region, write.offset, write.data);
                    written.map_err(refused)?;
                }
                Ok((writes.len() as u64).to_le_bytes().to_vec())
            }
            Request::DmaMap {
                read,
                write,
                offset,
                address,
                size,
            } => {
                let rights = Rights { read, write };
                let file = fds.pop().map(Into::into);
                if !fds.is_empty() {
                    return Err(invalid("one range of memory, and several files"));
                }
                let mapped = endpoint.map(address, size, rights, file, offset);
                mapped.map_err(refused)?;
                Ok(Vec::new())
            }
            Request::DmaUnmap { range } => {
                endpoint.unmap(range).map_err(refused)?;
                Ok(body.get(..24).unwrap_or_default().to_vec())
            }
            Request::Reset => {
                endpoint.reset().map_err(refused)?;
                Ok(Vec::new())
            }
            Request::SetIrqs(request) => {
                if let Some(request) = irqs(&request, fds)? {
                    endpoint.irqs(request).map_err(refused)?;
                }
                Ok(Vec::new())
            }
        }
    }
}

/// The endpoint's refusal.
fn refused(error: std::io::Error) -> RequestError {
    RequestError(errno_of(&error), error.to_string().into())
}

/// The region that an access hits, if it lies within.
fn region(index: u32, offset: u64, len: usize) -> Result<Region, RequestError> {
    let region = Region::of(index).ok_or(const { invalid("no such region") })?;
    match region.holds(offset, len) {
        true => Ok(region),
        false => Err(invalid("an access outside its region")),
    }
}

/// What the endpoint is asked for, if anything.
fn irqs(
    request: &SetIrqs<'_>,
    fds: Vec<std::os::fd::OwnedFd>,
) -> Result<Option<IrqRequest>, RequestError> {
    let (start, count) = (request.start, request.count);
    if request.data != IrqData::EventFd && !fds.is_empty() {
        return Err(invalid("event fds, and the message does not say so"));
    }
    if request.index >= IRQ_INDICES {
        return Err(invalid("no such interrupts"));
    }
    let end = start.checked_add(count);
    let all = vectors(request.index);
    let off = request.data == IrqData::EventFd && fds.is_empty();
    if all == 0 && (count == 0 || off) {
        // To switch off what is not there is fine.
        return Ok(None);
    }
    let Some(end) = end.filter(|end| *end <= all) else {
        return Err(invalid("no such vector"));
    };
    let chosen = || match request.data {
        IrqData::Bool(bools) => {
            let chosen = (start..end).zip(bools).filter(|(_, chosen)| **chosen != 0);
            chosen.map(|(vector, _)| vector).collect()
        }
        IrqData::None | IrqData::EventFd => (start..end).collect(),
    };
    Ok(Some(match (request.action, request.data) {
        (IrqAction::Trigger, IrqData::None) if count == 0 => IrqRequest::DisableAll,
        (IrqAction::Trigger, IrqData::None | IrqData::Bool(_)) => {
            IrqRequest::Trigger { vectors: chosen() }
        }
        (IrqAction::Trigger, IrqData::EventFd) if fds.is_empty() => {
            IrqRequest::Deassign { vectors: chosen() }
        }
        (IrqAction::Trigger, IrqData::EventFd) if fds.len() == count as usize => {
            IrqRequest::Assign { start, fds }
        }
        (IrqAction::Trigger, IrqData::EventFd) => {
            return Err(invalid("not as many event fds as vectors"));
        }
        (IrqAction::Mask | IrqAction::Unmask, IrqData::EventFd) => {
            return Err(RequestError(
                Errno::EOPNOTSUPP,
                "no event fds tell or ask for masking".into(),
            ));
        }
        (action, _) => IrqRequest::Mask {
            vectors: chosen(),
            masked: action == IrqAction::Mask,
        },
    }))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

// A client may send all its event fds at once.
const _: () = assert!(extlb_spec::VECTORS as usize <= MAX_FDS);
