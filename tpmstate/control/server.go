package control

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nvstore.dev/tpmstate"
)

// A TPM is what the channel steers. Calls come one at a time, except for
// Cancel. Results other than Success go back to the peer as they are.
type TPM interface {
	// Start is INIT: it (re)starts the TPM, with the volatile state that is
	// there, which is deleted from the store if the flag says so.
	Start(deleteVolatile bool) Result
	// Stop is STOP, and half of SHUTDOWN.
	Stop()
	Running() bool

	Established() (bool, Result)
	ResetEstablished(locality byte) Result
	SetLocality(locality byte) Result
	HashStart() Result
	HashData(p []byte) Result
	HashEnd() Result
	Cancel() Result

	// StoreVolatile stores the volatile state.
	StoreVolatile() Result
	// State returns a blob as swtpm hands it out, and whether what is in it
	// is encrypted with the key of the store. It is empty where there is no
	// such state.
	State(k tpmstate.Kind, decrypted bool) (blob []byte, encrypted bool, r Result)
	// SetState is told of all blobs that a stopped TPM shall start with.
	SetState(k tpmstate.Kind, blob []byte, encrypted bool) Result
	// LockStorage takes the store, after an outgoing migration that failed.
	LockStorage(retries uint32) Result

	// BufferSize is that of package libtpms.
	BufferSize(want uint32) (size, least, most uint32)
	Info(flags uint64) string
	Keys() (file, migration bool)

	// Data takes over the data channel's connection, and returns false if
	// there is one.
	Data(f *os.File) bool
}

// Limits on a message.
const (
	// Deadline is how long a message may take to arrive once it has begun.
	Deadline = 500 * time.Millisecond

	maxHash = 64 << 20 // one HASH_DATA; what starts a machine fits
	maxInfo = 3 << 10  // of GET_INFO, one reply
	chunk   = 64 << 10
)

// A Server answers one peer after another.
type Server struct {
	TPM  TPM
	TPM2 bool // it is a TPM 2.0, whose commands may have a header

	// Log is told of each command and its result. It may be nil.
	Log func(c Command, r Result)
}

// ErrShutdown: the peer asked for the end of the process.
var ErrShutdown = errors.New("the control channel asked for shutdown")

// Serve answers messages until the peer hangs up, which is nil, or asks for
// SHUTDOWN, which is ErrShutdown. It closes the connection.
func (s *Server) Serve(conn net.Conn) error {
	defer conn.Close()
	m := &message{conn: conn}
	defer m.dropFiles()
	for {
		c, err := m.next()
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		reply, err := s.answer(c, m)
		if err != nil {
			return fmt.Errorf("%v: %w", c, err)
		}
		if s.Log != nil {
			s.Log(c, Result(binary.BigEndian.Uint32(reply)))
		}
		conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Write(reply); err != nil {
			return err
		}
		if c == Shutdown {
			return ErrShutdown
		}
	}
}

func result(r Result) []byte { return words(uint32(r)) }

func words(list ...uint32) []byte {
	var b []byte
	for _, w := range list {
		b = binary.BigEndian.AppendUint32(b, w)
	}
	return b
}

// answer executes one command. An error means that the stream can't be
// followed any more.
func (s *Server) answer(c Command, m *message) ([]byte, error) {
	if needsRunning(c) && !s.TPM.Running() || c == SetStateBlob && s.TPM.Running() {
		if err := m.skip(c); err != nil {
			return nil, err
		}
		return result(BadOrdinal), nil
	}
	switch c {
	case GetCapability:
		return words(0, s.capabilities()), nil
	case Init:
		flags, err := m.uint32()
		return s.run(err, func() Result { return s.TPM.Start(flags&initDeleteVolatile != 0) })
	case Stop, Shutdown:
		s.TPM.Stop()
		return result(Success), nil
	case GetTPMEstablished:
		bit, r := s.TPM.Established()
		out := append(result(r), 0, 0, 0, 0)
		if bit {
			out[4] = 1
		}
		return out, nil
	case SetLocality:
		l, err := m.locality()
		return s.run(err, func() Result { return s.TPM.SetLocality(l) })
	case ResetTPMEstablished:
		l, err := m.locality()
		return s.run(err, func() Result { return s.TPM.ResetEstablished(l) })
	case HashStart:
		return result(s.TPM.HashStart()), nil
	case HashData:
		return s.hash(m)
	case HashEnd:
		return result(s.TPM.HashEnd()), nil
	case CancelTPMCmd:
		return result(s.TPM.Cancel()), nil
	case StoreVolatile:
		return result(s.TPM.StoreVolatile()), nil
	case LockStorage:
		n, err := m.uint32()
		return s.run(err, func() Result { return s.TPM.LockStorage(n) })
	case SetDataFD:
		return result(s.dataFD(m)), nil
	case SetBufferSize:
		return s.bufferSize(m)
	case GetConfig:
		return words(0, s.config()), nil
	case GetStateBlob:
		return s.getState(m)
	case SetStateBlob:
		return s.setState(m)
	case GetInfo:
		return s.info(m)
	default:
		// What follows isn't known, so neither is where the next one
		// begins; swtpm drops what has arrived.
		return result(BadOrdinal), m.discard()
	}
}

func (s *Server) run(err error, fn func() Result) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	return result(fn()), nil
}

func needsRunning(c Command) bool {
	switch c {
	case GetTPMEstablished, ResetTPMEstablished, HashStart, HashData, HashEnd, CancelTPMCmd, StoreVolatile, GetStateBlob:
		return true
	}
	return false
}

func (s *Server) capabilities() uint32 {
	caps := capInit | capShutdown | capGetEstablished | capSetLocality | capHashing | capCancel | capStoreVolatile |
		capResetEstablished | capGetState | capSetState | capStop | capGetConfig | capSetDataFD | capSetBufferSize |
		capGetInfo | capLockStorage
	if s.TPM2 {
		caps |= capSendCommandHeader
	}
	return caps
}

func (s *Server) config() uint32 {
	var flags uint32
	file, migration := s.TPM.Keys()
	if file {
		flags |= configFileKey
	}
	if migration {
		flags |= configMigrationKey
	}
	return flags
}

// hash measures data of any length, a piece at a time.
func (s *Server) hash(m *message) ([]byte, error) {
	n, err := m.uint32()
	if err != nil {
		return nil, err
	}
	if n > maxHash {
		return nil, fmt.Errorf("%d bytes to measure, and %d are the limit", n, maxHash)
	}
	buf := make([]byte, min(n, chunk))
	r := Success
	for n > 0 {
		b := buf[:min(n, chunk)]
		if err := m.read(b); err != nil {
			return nil, err
		}
		if r == Success {
			r = s.TPM.HashData(b)
		}
		n -= uint32(len(b))
	}
	return result(r), nil
}

// dataFD hands over the descriptor that came with the message.
func (s *Server) dataFD(m *message) Result {
	f := m.takeFile()
	if f == nil {
		return BadParameter
	}
	if !s.TPM.Data(f) {
		f.Close()
		return IOError
	}
	return Success
}

func (s *Server) bufferSize(m *message) ([]byte, error) {
	want, err := m.uint32()
	if err != nil {
		return nil, err
	}
	if want > 0 && s.TPM.Running() {
		return result(BadOrdinal), nil
	}
	size, least, most := s.TPM.BufferSize(want)
	return words(0, size, least, most), nil
}

func (s *Server) getState(m *message) ([]byte, error) {
	var req [12]byte
	if err := m.read(req[:]); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	flags, typ, off := be.Uint32(req[:]), be.Uint32(req[4:]), be.Uint32(req[8:])
	if typ < firstType || typ > firstType+uint32(tpmstate.Savestate) {
		return words(uint32(BadParameter), 0, 0, 0), nil
	}
	blob, encrypted, r := s.TPM.State(tpmstate.Kind(typ-firstType), flags&stateDecrypted != 0)
	if r != Success {
		return words(uint32(r), 0, 0, 0), nil
	}
	blob = blob[min(uint64(off), uint64(len(blob))):]
	var out uint32
	if encrypted {
		out = stateEncrypted
	}
	return append(words(0, out, uint32(len(blob)), uint32(len(blob))), blob...), nil
}

func (s *Server) setState(m *message) ([]byte, error) {
	var req [12]byte
	if err := m.read(req[:]); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	flags, typ, n := be.Uint32(req[:]), be.Uint32(req[4:]), be.Uint32(req[8:])
	if n > tpmstate.MaxState {
		// As swtpm; and it isn't read, so the connection ends.
		return nil, fmt.Errorf("a state of %d bytes: %w", n, tpmstate.ErrTooLarge)
	}
	blob := make([]byte, n)
	if err := m.read(blob); err != nil {
		return nil, err
	}
	if typ < firstType || typ > firstType+uint32(tpmstate.Savestate) {
		return result(BadParameter), nil
	}
	return result(s.TPM.SetState(tpmstate.Kind(typ-firstType), blob, flags&stateEncrypted != 0)), nil
}

func (s *Server) info(m *message) ([]byte, error) {
	var req [16]byte
	if err := m.read(req[:]); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	text := append([]byte(s.TPM.Info(be.Uint64(req[:]))), 0)
	off := be.Uint32(req[8:])
	if len(text) == 1 || uint64(off) >= uint64(len(text)-1) {
		return result(BadParameter), nil
	}
	part := text[off:min(uint64(off)+maxInfo, uint64(len(text)))]
	return append(words(0, uint32(len(text)), uint32(len(part))), part...), nil
}

// A message is read from the connection as far as its command asks.
type message struct {
	conn  net.Conn
	files []int
}

// next waits for a command, without limit, and then for the whole of it.
func (m *message) next() (Command, error) {
	m.dropFiles()
	m.conn.SetReadDeadline(time.Time{})
	var b [4]byte
	n, err := m.receive(b[:])
	if err != nil {
		return 0, err
	}
	m.conn.SetReadDeadline(time.Now().Add(Deadline))
	if err := m.read(b[n:]); err != nil {
		return 0, err
	}
	return Command(binary.BigEndian.Uint32(b[:])), nil
}

// receive reads once, with the descriptors that come along.
func (m *message) receive(b []byte) (int, error) {
	u, ok := m.conn.(*net.UnixConn)
	if !ok {
		return m.conn.Read(b)
	}
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, on, _, _, err := u.ReadMsgUnix(b, oob)
	if on > 0 {
		if list, e := unix.ParseSocketControlMessage(oob[:on]); e == nil {
			for i := range list {
				fds, _ := unix.ParseUnixRights(&list[i])
				m.files = append(m.files, fds...)
			}
		}
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	return n, err
}

func (m *message) takeFile() *os.File {
	if len(m.files) == 0 {
		return nil
	}
	fd := m.files[0]
	m.files = m.files[1:]
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "data channel")
}

func (m *message) dropFiles() {
	for _, fd := range m.files {
		unix.Close(fd)
	}
	m.files = nil
}

func (m *message) read(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	_, err := io.ReadFull(m.conn, p)
	return cut(err)
}

// cut names an end in the middle of a message.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (m *message) uint32() (uint32, error) {
	var b [4]byte
	err := m.read(b[:])
	return binary.BigEndian.Uint32(b[:]), err
}

// locality is one byte, of which QEMU sends the structure around it, of 4.
// They were written at once, so what has arrived tells which it is.
func (m *message) locality() (byte, error) {
	var b [4]byte
	if err := m.read(b[:1]); err != nil {
		return 0, err
	}
	return b[0], m.arrived(b[1:])
}

// arrived reads what is there already, without waiting.
func (m *message) arrived(b []byte) error {
	s, ok := m.conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT)
		return true
	})
}

// skip reads what belongs to a command that isn't executed.
func (m *message) skip(c Command) error {
	n := map[Command]int{ResetTPMEstablished: -1, HashData: 4, SetStateBlob: 12, GetStateBlob: 12}[c]
	if n < 0 {
		_, err := m.locality()
		return err
	}
	b := make([]byte, n)
	if err := m.read(b); err != nil {
		return err
	}
	if c == HashData || c == SetStateBlob {
		_, err := io.CopyN(io.Discard, m.conn, int64(binary.BigEndian.Uint32(b[n-4:])))
		return cut(err)
	}
	return nil
}

// discard drops what has arrived.
func (m *message) discard() error {
	return m.arrived(make([]byte, chunk))
}
