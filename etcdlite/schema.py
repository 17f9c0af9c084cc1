"""The messages of etcd v3's API, of gRPC's health checks and of etcdlite's own protocol, as one
table.

`proto.py` makes a class and a codec of each message, `wire/reflection.py` the descriptors. The
methods are in `methods.py`.
"""

from __future__ import annotations

# A line per item, continued by indented lines. A field is "number name type"; "*" marks a repeated
# field, "|x" a member of the oneof x.
SCHEMA = """
package mvccpb
message KeyValue: 1 key bytes, 2 create_revision int64, 3 mod_revision int64, 4 version int64,
    5 value bytes, 6 lease int64
enum Event.EventType: PUT=0, DELETE=1
message Event: 1 type Event.EventType, 2 kv KeyValue, 3 prev_kv KeyValue

package authpb
message UserAddOptions: 1 no_password bool
message User: 1 name bytes, 2 password bytes, 3 roles *string, 4 options UserAddOptions
enum Permission.Type: READ=0, WRITE=1, READWRITE=2
message Permission: 1 permType Permission.Type, 2 key bytes, 3 range_end bytes
message Role: 1 name bytes, 2 keyPermission *Permission

package etcdserverpb
message ResponseHeader: 1 cluster_id uint64, 2 member_id uint64, 3 revision int64,
    4 raft_term uint64
enum RangeRequest.SortOrder: NONE=0, ASCEND=1, DESCEND=2
enum RangeRequest.SortTarget: KEY=0, VERSION=1, CREATE=2, MOD=3, VALUE=4
message RangeRequest: 1 key bytes, 2 range_end bytes, 3 limit int64, 4 revision int64,
    5 sort_order RangeRequest.SortOrder, 6 sort_target RangeRequest.SortTarget,
    7 serializable bool, 8 keys_only bool, 9 count_only bool, 10 min_mod_revision int64,
    11 max_mod_revision int64, 12 min_create_revision int64, 13 max_create_revision int64
message RangeResponse: 1 header ResponseHeader, 2 kvs *KeyValue, 3 more bool, 4 count int64
message PutRequest: 1 key bytes, 2 value bytes, 3 lease int64, 4 prev_kv bool,
    5 ignore_value bool, 6 ignore_lease bool
message PutResponse: 1 header ResponseHeader, 2 prev_kv KeyValue
message DeleteRangeRequest: 1 key bytes, 2 range_end bytes, 3 prev_kv bool
message DeleteRangeResponse: 1 header ResponseHeader, 2 deleted int64, 3 prev_kvs *KeyValue
message RequestOp: 1 request_range RangeRequest |request, 2 request_put PutRequest |request,
    3 request_delete_range DeleteRangeRequest |request, 4 request_txn TxnRequest |request
message ResponseOp: 1 response_range RangeResponse |response,
    2 response_put PutResponse |response, 3 response_delete_range DeleteRangeResponse |response,
    4 response_txn TxnResponse |response
enum Compare.CompareResult: EQUAL=0, GREATER=1, LESS=2, NOT_EQUAL=3
enum Compare.CompareTarget: VERSION=0, CREATE=1, MOD=2, VALUE=3, LEASE=4
message Compare: 1 result Compare.CompareResult, 2 target Compare.CompareTarget, 3 key bytes,
    4 version int64 |target_union, 5 create_revision int64 |target_union,
    6 mod_revision int64 |target_union, 7 value bytes |target_union, 8 lease int64 |target_union,
    64 range_end bytes
message TxnRequest: 1 compare *Compare, 2 success *RequestOp, 3 failure *RequestOp
message TxnResponse: 1 header ResponseHeader, 2 succeeded bool, 3 responses *ResponseOp
message CompactionRequest: 1 revision int64, 2 physical bool
message CompactionResponse: 1 header ResponseHeader
message HashRequest:
message HashKVRequest: 1 revision int64, 1000 of_members bool
message HashKVResponse: 1 header ResponseHeader, 2 hash uint32, 3 compact_revision int64,
    4 hash_revision int64
message HashResponse: 1 header ResponseHeader, 2 hash uint32
enum SnapshotRequest.Format: DEFAULT=0, ETCDLITE=1, ETCD=2
message SnapshotRequest: 1000 format SnapshotRequest.Format
message SnapshotResponse: 1 header ResponseHeader, 2 remaining_bytes uint64, 3 blob bytes,
    4 version string
message WatchRequest: 1 create_request WatchCreateRequest |request_union,
    2 cancel_request WatchCancelRequest |request_union,
    3 progress_request WatchProgressRequest |request_union
enum WatchCreateRequest.FilterType: NOPUT=0, NODELETE=1
message WatchCreateRequest: 1 key bytes, 2 range_end bytes, 3 start_revision int64,
    4 progress_notify bool, 5 filters *WatchCreateRequest.FilterType, 6 prev_kv bool,
    7 watch_id int64, 8 fragment bool
message WatchCancelRequest: 1 watch_id int64
message WatchProgressRequest:
message WatchResponse: 1 header ResponseHeader, 2 watch_id int64, 3 created bool, 4 canceled bool,
    5 compact_revision int64, 6 cancel_reason string, 7 fragment bool, 11 events *Event
message LeaseGrantRequest: 1 TTL int64, 2 ID int64
message LeaseGrantResponse: 1 header ResponseHeader, 2 ID int64, 3 TTL int64, 4 error string
message LeaseRevokeRequest: 1 ID int64
message LeaseRevokeResponse: 1 header ResponseHeader
message LeaseCheckpoint: 1 ID int64, 2 remaining_TTL int64
message LeaseCheckpointRequest: 1 checkpoints *LeaseCheckpoint
message LeaseCheckpointResponse: 1 header ResponseHeader
message LeaseKeepAliveRequest: 1 ID int64
message LeaseKeepAliveResponse: 1 header ResponseHeader, 2 ID int64, 3 TTL int64
message LeaseTimeToLiveRequest: 1 ID int64, 2 keys bool
message LeaseTimeToLiveResponse: 1 header ResponseHeader, 2 ID int64, 3 TTL int64,
    4 grantedTTL int64, 5 keys *bytes
message LeaseLeasesRequest:
message LeaseStatus: 1 ID int64
message LeaseLeasesResponse: 1 header ResponseHeader, 2 leases *LeaseStatus
message Member: 1 ID uint64, 2 name string, 3 peerURLs *string, 4 clientURLs *string,
    5 isLearner bool
message MemberAddRequest: 1 peerURLs *string, 2 isLearner bool
message MemberAddResponse: 1 header ResponseHeader, 2 member Member, 3 members *Member
message MemberRemoveRequest: 1 ID uint64
message MemberRemoveResponse: 1 header ResponseHeader, 2 members *Member
message MemberUpdateRequest: 1 ID uint64, 2 peerURLs *string
message MemberUpdateResponse: 1 header ResponseHeader, 2 members *Member
message MemberListRequest: 1 linearizable bool
message MemberListResponse: 1 header ResponseHeader, 2 members *Member
message MemberPromoteRequest: 1 ID uint64
message MemberPromoteResponse: 1 header ResponseHeader, 2 members *Member
message DefragmentRequest:
message DefragmentResponse: 1 header ResponseHeader
message MoveLeaderRequest: 1 targetID uint64
message MoveLeaderResponse: 1 header ResponseHeader
enum AlarmType: NONE=0, NOSPACE=1, CORRUPT=2
enum AlarmRequest.AlarmAction: GET=0, ACTIVATE=1, DEACTIVATE=2
message AlarmRequest: 1 action AlarmRequest.AlarmAction, 2 memberID uint64, 3 alarm AlarmType
message AlarmMember: 1 memberID uint64, 2 alarm AlarmType
message AlarmResponse: 1 header ResponseHeader, 2 alarms *AlarmMember
enum DowngradeRequest.DowngradeAction: VALIDATE=0, ENABLE=1, CANCEL=2
message DowngradeRequest: 1 action DowngradeRequest.DowngradeAction, 2 version string
message DowngradeResponse: 1 header ResponseHeader, 2 version string
message DowngradeVersionTestRequest: 1 ver string
message StatusRequest:
message StatusResponse: 1 header ResponseHeader, 2 version string, 3 dbSize int64,
    4 leader uint64, 5 raftIndex uint64, 6 raftTerm uint64, 7 raftAppliedIndex uint64,
    8 errors *string, 9 dbSizeInUse int64, 10 isLearner bool, 11 storageVersion string,
    12 dbSizeQuota int64, 13 downgradeInfo DowngradeInfo
message DowngradeInfo: 1 enabled bool, 2 targetVersion string
message AuthEnableRequest:
message AuthDisableRequest:
message AuthStatusRequest:
message AuthenticateRequest: 1 name string, 2 password string
message AuthUserAddRequest: 1 name string, 2 password string, 3 options UserAddOptions,
    4 hashedPassword string
message AuthUserGetRequest: 1 name string
message AuthUserDeleteRequest: 1 name string
message AuthUserChangePasswordRequest: 1 name string, 2 password string, 3 hashedPassword string
message AuthUserGrantRoleRequest: 1 user string, 2 role string
message AuthUserRevokeRoleRequest: 1 name string, 2 role string
message AuthRoleAddRequest: 1 name string
message AuthRoleGetRequest: 1 role string
message AuthUserListRequest:
message AuthRoleListRequest:
message AuthRoleDeleteRequest: 1 role string
message AuthRoleGrantPermissionRequest: 1 name string, 2 perm Permission
message AuthRoleRevokePermissionRequest: 1 role string, 2 key bytes, 3 range_end bytes
message AuthRotateKeyRequest: 1 seed bytes
message AuthEnableResponse: 1 header ResponseHeader
message AuthDisableResponse: 1 header ResponseHeader
message AuthStatusResponse: 1 header ResponseHeader, 2 enabled bool, 3 authRevision uint64
message AuthenticateResponse: 1 header ResponseHeader, 2 token string
message AuthUserAddResponse: 1 header ResponseHeader
message AuthUserGetResponse: 1 header ResponseHeader, 2 roles *string
message AuthUserDeleteResponse: 1 header ResponseHeader
message AuthUserChangePasswordResponse: 1 header ResponseHeader
message AuthUserGrantRoleResponse: 1 header ResponseHeader
message AuthUserRevokeRoleResponse: 1 header ResponseHeader
message AuthRoleAddResponse: 1 header ResponseHeader
message AuthRoleGetResponse: 1 header ResponseHeader, 2 perm *Permission
message AuthRoleListResponse: 1 header ResponseHeader, 2 roles *string
message AuthUserListResponse: 1 header ResponseHeader, 2 users *string
message AuthRoleDeleteResponse: 1 header ResponseHeader
message AuthRoleGrantPermissionResponse: 1 header ResponseHeader
message AuthRoleRevokePermissionResponse: 1 header ResponseHeader
message AuthRotateKeyResponse: 1 header ResponseHeader
message RangeStreamResponse: 1 range_response RangeResponse

package v3lockpb
message LockRequest: 1 name bytes, 2 lease int64
message LockResponse: 1 header ResponseHeader, 2 key bytes
message UnlockRequest: 1 key bytes
message UnlockResponse: 1 header ResponseHeader

package v3electionpb
message CampaignRequest: 1 name bytes, 2 lease int64, 3 value bytes
message CampaignResponse: 1 header ResponseHeader, 2 leader LeaderKey
message LeaderKey: 1 name bytes, 2 key bytes, 3 rev int64, 4 lease int64
message LeaderRequest: 1 name bytes
message LeaderResponse: 1 header ResponseHeader, 2 kv KeyValue
message ResignRequest: 1 leader LeaderKey
message ResignResponse: 1 header ResponseHeader
message ProclaimRequest: 1 leader LeaderKey, 2 value bytes
message ProclaimResponse: 1 header ResponseHeader

package grpc.health.v1
message HealthCheckRequest: 1 service string
enum HealthCheckResponse.ServingStatus: UNKNOWN=0, SERVING=1, NOT_SERVING=2, SERVICE_UNKNOWN=3
message HealthCheckResponse: 1 status HealthCheckResponse.ServingStatus

package etcdlite
message Hello: 1 cluster_id uint64, 2 member_id uint64, 3 version string,
    4 max_request_bytes uint64, 5 cluster_version string
message Error: 1 code int32, 2 message string
enum MemberChange.Action: ADD=0, REMOVE=1, UPDATE=2, PROMOTE=3
message MemberChange: 1 action MemberChange.Action, 2 member Member
message Introduction: 1 cluster_id uint64, 2 member_id uint64, 3 to uint64, 4 version string,
    5 snapshot SnapshotOffer, 6 life uint64, 7 recovered LogPosition
message LogPosition: 1 term uint64, 2 index uint64, 3 founding uint64
message SnapshotOffer: 1 index uint64, 2 term uint64, 3 voters *uint64, 4 learners *uint64,
    5 size_bytes uint64, 6 nonce uint64, 7 leader_term uint64
message Welcome: 1 offset uint64, 2 life uint64, 3 recovered LogPosition
message Author: 1 name string, 2 revision uint64, 3 is_member bool
message TokenKey: 1 seed bytes
message Rehash: 1 name string, 2 old bytes, 3 new bytes
message Time: 1 unix_s int64
message RevisionTime: 1 revision int64, 2 unix_s int64
message RevisionUser: 1 revision int64, 2 user string, 3 is_member bool
message TimelineRequest:
message TimelineResponse: 1 header ResponseHeader, 2 times *RevisionTime, 3 users *RevisionUser
message ClusterVersion: 1 version string, 2 target string, 3 old_version string,
    4 old_target string
"""
