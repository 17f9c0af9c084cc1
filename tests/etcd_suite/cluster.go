// Copyright 2016 The etcd Authors
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

// This takes the place of etcd's tests/integration/cluster.go, from which its types and the names of
// its functions are. There, a member is a server within the test's process; here it is a process of
// the program that STORE names, started with etcd's flags (member.go).

package integration

import (
	"context"
	"fmt"
	"math/rand"
	"reflect"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/testutil"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/client/v2"
	clientv3 "go.etcd.io/etcd/client/v3"
	epb "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	lockpb "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc"
)

const (
	RequestWaitTimeout = 5 * time.Second
	// tickDuration is 10 ms in etcd, too short for processes that share a machine.
	tickDuration   = 50 * time.Millisecond
	requestTimeout = 20 * time.Second
	matchTimeout   = 60 * time.Second
)

var (
	electionTicks = 10

	TestTLSInfo                  = tlsInfo("../fixtures/server")
	testTLSInfoIP                = tlsInfo("../fixtures/server-ip")
	testTLSInfoExpired           = tlsInfo("fixtures-expired/server")
	testTLSInfoExpiredIP         = tlsInfo("fixtures-expired/server-ip")
	testTLSInfoWithSpecificUsage = transport.TLSInfo{
		KeyFile:        MustAbsPath("../fixtures/server-serverusage.key.insecure"),
		CertFile:       MustAbsPath("../fixtures/server-serverusage.crt"),
		ClientKeyFile:  MustAbsPath("../fixtures/client-clientusage.key.insecure"),
		ClientCertFile: MustAbsPath("../fixtures/client-clientusage.crt"),
		TrustedCAFile:  MustAbsPath("../fixtures/ca.crt"),
		ClientCertAuth: true,
	}
	defaultTokenJWT = fmt.Sprintf("jwt,pub-key=%s,priv-key=%s,sign-method=RS256,ttl=2s",
		TestTLSInfo.CertFile, TestTLSInfo.KeyFile)
)

func tlsInfo(server string) transport.TLSInfo {
	folder := server[:strings.LastIndex(server, "/")]
	return transport.TLSInfo{
		KeyFile:        MustAbsPath(server + ".key.insecure"),
		CertFile:       MustAbsPath(server + ".crt"),
		TrustedCAFile:  MustAbsPath(folder + "/ca.crt"),
		ClientCertAuth: true,
	}
}

// ClusterConfig has etcd's fields. The ones without an effect here: UseTCP, since members listen on
// TCP always, UseGRPC, SnapshotCatchUpEntries and LeaseCheckpointInterval, which no flag sets.
type ClusterConfig struct {
	Size         int
	PeerTLS      *transport.TLSInfo
	ClientTLS    *transport.TLSInfo
	DiscoveryURL string
	AuthToken    string
	AuthTokenTTL uint

	QuotaBackendBytes      int64
	MaxTxnOps              uint
	MaxRequestBytes        uint
	SnapshotCount          uint64
	SnapshotCatchUpEntries uint64

	GRPCKeepAliveMinTime  time.Duration
	GRPCKeepAliveInterval time.Duration
	GRPCKeepAliveTimeout  time.Duration

	SkipCreatingClient       bool
	ClientMaxCallSendMsgSize int
	ClientMaxCallRecvMsgSize int
	UseIP                    bool
	UseBridge                bool
	UseGRPC                  bool
	UseTCP                   bool

	EnableLeaseCheckpoint   bool
	LeaseCheckpointInterval time.Duration
	LeaseCheckpointPersist  bool

	WatchProgressNotifyInterval time.Duration
	CorruptCheckTime            time.Duration
}

type cluster struct {
	cfg     *ClusterConfig
	Members []*member
	named   int
}

func NewCluster(t testutil.TB, size int) *cluster {
	return newCluster(t, &ClusterConfig{Size: size})
}

func NewClusterByConfig(t testutil.TB, cfg *ClusterConfig) *cluster { return newCluster(t, cfg) }

// newCluster returns a cluster that is not started yet.
func newCluster(t testutil.TB, cfg *ClusterConfig) *cluster {
	c := &cluster{cfg: cfg}
	for i := 0; i < cfg.Size; i++ {
		c.Members = append(c.Members, c.mustNewMember(t))
	}
	for _, m := range c.Members {
		m.InitialPeerURLsMap = c.peerURLs()
	}
	return c
}

func (c *cluster) mustNewMember(t testutil.TB) *member {
	m := mustNewMember(t, memberConfig{name: fmt.Sprintf("m%d", c.named), ClusterConfig: *c.cfg})
	m.cluster = c
	c.named++
	return m
}

func (c *cluster) peerURLs() types.URLsMap {
	urls := types.URLsMap{}
	for _, m := range c.Members {
		urls[m.Name] = m.PeerURLs
	}
	return urls
}

func (c *cluster) Launch(t testutil.TB) {
	started := make(chan error)
	for _, m := range c.Members {
		go func(m *member) { started <- m.Launch() }(m)
	}
	var failure error
	for range c.Members {
		if err := <-started; err != nil {
			failure = err
		}
	}
	if failure != nil {
		c.Terminate(t)
		t.Fatalf("error setting up member: %v", failure)
	}
	c.waitMembersMatch(t, c.HTTPMembers())
}

func (c *cluster) URL(i int) string { return c.Members[i].URL() }

func (c *cluster) URLs() []string {
	var urls []string
	for _, m := range c.running(c.Members) {
		urls = append(urls, m.URL())
	}
	return urls
}

func (c *cluster) running(members []*member) (running []*member) {
	for _, m := range members {
		if !m.s.isStopped() {
			running = append(running, m)
		}
	}
	return running
}

// HTTPMembers returns what the members should list.
func (c *cluster) HTTPMembers() []*pb.Member {
	var members []*pb.Member
	for _, m := range c.Members {
		members = append(members, &pb.Member{
			Name:       m.Name,
			PeerURLs:   m.PeerURLs.StringSlice(),
			ClientURLs: m.ClientURLs.StringSlice(),
			IsLearner:  m.isLearner,
		})
	}
	return members
}

// waitMembersMatch waits until each running member lists the wanted ones: it has applied the changes
// of membership then, and all have told their names.
func (c *cluster) waitMembersMatch(t testutil.TB, wanted []*pb.Member) {
	order := func(members []*pb.Member) {
		sort.Slice(members, func(i, j int) bool {
			return members[i].PeerURLs[0] < members[j].PeerURLs[0]
		})
	}
	order(wanted)
	deadline := time.Now().Add(matchTimeout)
	for _, m := range c.running(c.Members) {
		for {
			listed, err := m.s.members()
			for _, other := range listed {
				other.ID = 0
			}
			order(listed)
			if err == nil && reflect.DeepEqual(listed, wanted) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s lists the members %v (%v), wanted %v", m.Name, listed, err, wanted)
			}
			time.Sleep(tickDuration)
		}
	}
}

func (c *cluster) AddMember(t testutil.TB) types.URLs {
	m := c.mustNewMember(t)
	var err error
	for i := range c.Members {
		if err = c.addMemberByURL(t, c.URL(i), m.PeerURLs[0].String()); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatalf("add member failed on all members error: %v", err)
	}
	c.join(t, m)
	return m.PeerURLs
}

// join starts a member that the cluster lists already.
func (c *cluster) join(t testutil.TB, m *member) {
	m.NewCluster = false
	m.InitialPeerURLsMap = c.peerURLs()
	m.InitialPeerURLsMap[m.Name] = m.PeerURLs
	if err := m.Launch(); err != nil {
		t.Fatal(err)
	}
	c.Members = append(c.Members, m)
	c.waitMembersMatch(t, c.HTTPMembers())
}

func (c *cluster) addMemberByURL(t testutil.TB, clientURL, peerURL string) error {
	for _, m := range c.running(c.Members) {
		if m.URL() == clientURL {
			ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
			defer cancel()
			if _, err := m.serverClient.MemberAdd(ctx, []string{peerURL}); err != nil {
				return asV2(err)
			}
			c.waitMembersMatch(t, append(c.HTTPMembers(), &pb.Member{PeerURLs: []string{peerURL}}))
			return nil
		}
	}
	return fmt.Errorf("the member at %s is stopped", clientURL)
}

// asV2 adds the words in which etcd's v2 client, which changed the membership here, says that the
// cluster is not healthy.
func asV2(err error) error {
	if err == rpctypes.ErrUnhealthy {
		return fmt.Errorf("%w (has no leader)", err)
	}
	return err
}

func (c *cluster) RemoveMember(t testutil.TB, id uint64) {
	if err := c.removeMember(t, id); err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) removeMember(t testutil.TB, id uint64) error {
	err := fmt.Errorf("all members are stopped")
	for _, m := range c.running(c.Members) {
		ctx, cancel := context.WithTimeout(context.Background(), RequestWaitTimeout)
		_, err = m.serverClient.MemberRemove(ctx, id)
		cancel()
		if err == nil {
			break
		}
	}
	if err != nil {
		return asV2(err)
	}
	var rest []*member
	for _, m := range c.Members {
		if uint64(m.ID()) != id {
			rest = append(rest, m)
			continue
		}
		select {
		case <-m.s.StopNotify():
			m.Terminate(t)
		case <-time.After(10 * time.Second):
			t.Fatalf("failed to remove member %s in time", m.ID())
		}
	}
	c.Members = rest
	c.waitMembersMatch(t, c.HTTPMembers())
	return nil
}

func (c *cluster) Terminate(t testutil.TB) {
	var wg sync.WaitGroup
	for _, m := range c.Members {
		wg.Add(1)
		go func(m *member) {
			defer wg.Done()
			m.Terminate(t)
		}(m)
	}
	wg.Wait()
}

// WaitLeader returns the index of the leader.
func (c *cluster) WaitLeader(t testutil.TB) int { return c.waitLeader(t, c.Members) }

// waitLeader waits until the running ones of members agree that one of members leads; returns its
// index.
func (c *cluster) waitLeader(t testutil.TB, members []*member) int {
	for {
		leads := map[uint64]bool{}
		for _, m := range c.running(members) {
			leads[m.s.Lead()] = true
		}
		for i, m := range members {
			if len(leads) == 1 && leads[uint64(m.ID())] {
				return i
			}
		}
		time.Sleep(tickDuration)
	}
}

func (c *cluster) WaitNoLeader() { c.waitNoLeader(c.Members) }

func (c *cluster) waitNoLeader(members []*member) {
	for _, m := range c.running(members) {
		for m.s.Lead() != 0 {
			time.Sleep(tickDuration)
		}
	}
}

func checkLeaderTransition(m *member, oldLead uint64) uint64 {
	for {
		if lead := m.s.Lead(); lead != 0 && lead != oldLead {
			return lead
		}
		time.Sleep(tickDuration)
	}
}

// clusterMustProgress writes a key and waits until each member has it.
func clusterMustProgress(t *testing.T, members []*member) {
	key := fmt.Sprintf("foo%d", rand.Int())
	var err error
	for i := 0; i < 3; i++ {
		ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
		_, err = members[0].serverClient.Put(ctx, key, "bar")
		cancel()
		if err == nil {
			break
		}
	}
	if err != nil {
		t.Fatalf("create on %s error: %v", members[0].URL(), err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
	defer cancel()
	for _, m := range members {
		for {
			got, err := m.serverClient.Get(ctx, key, clientv3.WithSerializable())
			if err == nil && got.Count == 1 {
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("%s does not have the key: %v", m.URL(), err)
			}
			time.Sleep(tickDuration)
		}
	}
}

// MustNewHTTPClient returns a client of the v2 API, which etcdlite does not have.
func MustNewHTTPClient(t testutil.TB, eps []string, tls *transport.TLSInfo) client.Client {
	c, err := client.New(client.Config{Endpoints: eps})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type ClusterV3 struct {
	*cluster

	mu            sync.Mutex
	clients       []*clientv3.Client
	clusterClient *clientv3.Client
}

// NewClusterV3 returns a running cluster, with a client of each member.
func NewClusterV3(t testutil.TB, cfg *ClusterConfig) *ClusterV3 {
	t.Helper()
	assertInTestContext(t)
	c := &ClusterV3{cluster: newCluster(t, cfg)}
	c.Launch(t)
	if !cfg.SkipCreatingClient {
		for _, m := range c.Members {
			client, err := NewClientV3(m)
			if err != nil {
				t.Fatalf("cannot create client: %v", err)
			}
			c.clients = append(c.clients, client)
		}
	}
	return c
}

// TakeClient leaves the closing of a client to the caller.
func (c *ClusterV3) TakeClient(i int) {
	c.mu.Lock()
	c.clients[i] = nil
	c.mu.Unlock()
}

func (c *ClusterV3) Terminate(t testutil.TB) {
	c.mu.Lock()
	for _, client := range append(c.clients, c.clusterClient) {
		if client != nil {
			if err := client.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	c.mu.Unlock()
	c.cluster.Terminate(t)
}

func (c *ClusterV3) RandClient() *clientv3.Client { return c.clients[rand.Intn(len(c.clients))] }

func (c *ClusterV3) Client(i int) *clientv3.Client { return c.clients[i] }

// ClusterClient returns a client of all members.
func (c *ClusterV3) ClusterClient() (client *clientv3.Client, err error) {
	if c.clusterClient == nil {
		cfg := clientv3.Config{
			DialTimeout: 5 * time.Second,
			DialOptions: []grpc.DialOption{grpc.WithBlock()},
		}
		for _, m := range c.Members {
			cfg.Endpoints = append(cfg.Endpoints, m.GRPCURL())
		}
		c.clusterClient, err = newClientV3(cfg, cfg.Logger)
	}
	return c.clusterClient, err
}

func (c *ClusterV3) NewClientV3(i int) (*clientv3.Client, error) { return NewClientV3(c.Members[i]) }

// MakeSingleNodeClients returns a function that makes clients of member 0 and appends them to clients.
func MakeSingleNodeClients(t testutil.TB, c *ClusterV3, clients *[]*clientv3.Client) func() *clientv3.Client {
	return makeClients(t, c, clients, func() int { return 0 })
}

// MakeMultiNodeClients does the same for random members.
func MakeMultiNodeClients(t testutil.TB, c *ClusterV3, clients *[]*clientv3.Client) func() *clientv3.Client {
	return makeClients(t, c, clients, func() int { return rand.Intn(len(c.Members)) })
}

func makeClients(t testutil.TB, c *ClusterV3, clients *[]*clientv3.Client, choose func() int) func() *clientv3.Client {
	var mu sync.Mutex
	*clients = nil
	return func() *clientv3.Client {
		client, err := c.NewClientV3(choose())
		if err != nil {
			t.Fatalf("cannot create client: %v", err)
		}
		mu.Lock()
		*clients = append(*clients, client)
		mu.Unlock()
		return client
	}
}

func CloseClients(t testutil.TB, clients []*clientv3.Client) {
	for _, client := range clients {
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

type grpcAPI struct {
	Cluster     pb.ClusterClient
	KV          pb.KVClient
	Lease       pb.LeaseClient
	Watch       pb.WatchClient
	Maintenance pb.MaintenanceClient
	Auth        pb.AuthClient
	Lock        lockpb.LockClient
	Election    epb.ElectionClient
}

func (c *ClusterV3) GetLearnerMembers() ([]*pb.Member, error) {
	listed, err := c.Client(0).MemberList(context.Background())
	if err != nil {
		return nil, fmt.Errorf("failed to list member %v", err)
	}
	var learners []*pb.Member
	for _, m := range listed.Members {
		if m.IsLearner {
			learners = append(learners, m)
		}
	}
	return learners, nil
}

func (c *ClusterV3) AddAndLaunchLearnerMember(t testutil.TB) {
	m := c.mustNewMember(t)
	m.isLearner = true
	_, err := c.Client(0).MemberAddAsLearner(context.Background(), m.PeerURLs.StringSlice())
	if err != nil {
		t.Fatalf("failed to add learner member %v", err)
	}
	c.join(t, m)
}

// MustNewMember returns a member that is listed and not started yet.
func (c *ClusterV3) MustNewMember(t testutil.TB, added *clientv3.MemberAddResponse) *member {
	m := c.mustNewMember(t)
	m.isLearner = added.Member.IsLearner
	m.NewCluster = false
	m.PeerURLs = types.MustNewURLs(added.Member.PeerURLs)
	c.Members = append(c.Members, m)
	m.InitialPeerURLsMap = c.peerURLs()
	return m
}
